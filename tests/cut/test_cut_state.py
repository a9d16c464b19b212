"""A model with a bare cut carries the cut's memory and draws in its ``state_dict``, as one uint8 tensor."""

import io

import pytest
import torch
from torch import nn

import selbp

RULES = {
    "random": selbp.Random,
    "importance": lambda: selbp.GradNormImportance(threshold=1.2),
    "matching": selbp.GradientMatching,
    "DivBS": selbp.DivBS,
    "cube": selbp.CubeSampling,
    "percentile": lambda: selbp.LossPercentile(history=20),
}
KEY = "2._extra_state"


class Losses:
    """The losses of the last forward, for a rule that reads them."""

    def __init__(self):
        self.value = None

    def __call__(self):
        return self.value


def build(name, seed=3, generator=True, **options):
    torch.manual_seed(0)
    losses = Losses() if name == "percentile" else None
    draws = torch.Generator().manual_seed(seed) if generator else None
    cut = selbp.BackwardCut(4, RULES[name](), generator=draws, losses=losses, **options)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), cut, nn.Linear(8, 5)), losses


def train(model, losses, steps):
    for i in steps:
        draws = torch.Generator().manual_seed(i)
        x, y = torch.randn(16, 8, generator=draws), torch.randint(0, 5, (16,), generator=draws)
        each = nn.functional.cross_entropy(model(x), y, reduction="none")
        if losses is not None:
            losses.value = each.detach()
        each.mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.3 * p.grad)
                p.grad = None


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", RULES)
def test_a_resumed_model_goes_on_bit_for_bit(name):
    whole, losses = build(name)
    train(whole, losses, range(6))
    first, losses = build(name)
    train(first, losses, range(3))
    state = saved_and_loaded(first.state_dict())
    second, losses = build(name, seed=99)
    second.load_state_dict(state)
    train(second, losses, range(3, 6))
    assert same(whole, second)
    train(first, first[2]._cut.losses, range(3, 6))  # what was saved is a copy: the first run goes on as well
    assert same(whole, first)


def test_without_the_state_it_is_another_run():
    whole, _ = build("importance")
    train(whole, None, range(6))
    first, _ = build("importance")
    train(first, None, range(3))
    second, _ = build("importance")
    second.load_state_dict({name: value for name, value in first.state_dict().items() if name != KEY})
    train(second, None, range(3, 6))
    assert not same(whole, second)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("generator", [True, False], ids=["generator", "global"])
def test_the_entry_is_there_where_there_is_something_to_remember_and_always_as_large(name, generator):
    model, losses = build(name, generator=generator)
    expected = generator or name in ("importance", "percentile")
    before = dict(model.state_dict())
    assert (KEY in before) == expected
    train(model, losses, range(2))
    after = model.state_dict()
    assert after.keys() == before.keys()
    if expected:
        assert (before[KEY].dtype, before[KEY].dim()) == (torch.uint8, 1)
        assert before[KEY].shape == after[KEY].shape


@pytest.mark.parametrize("generator", [True, False], ids=["generator", "global"])
def test_a_checkpoint_of_the_model_without_the_entry_loads_strictly(generator):
    model, _ = build("importance", generator=generator)
    plain = {name: value for name, value in model.state_dict().items() if name != KEY}
    result = model.load_state_dict(plain)
    assert not result.missing_keys and not result.unexpected_keys
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        model.load_state_dict({name: value for name, value in plain.items() if name != "0.weight"})


MISFITS = {
    "another rule": (lambda: build("cube")[0].state_dict()[KEY], "of a CubeSampling, the selector is a GradNormImp"),
    "no generator": (lambda: build("importance", generator=False)[0].state_dict()[KEY], "pass a generator to both"),
    "not packed": (lambda: {"tau": 1.0}, "must be a uint8 tensor"),
    "cut short": (lambda: build("importance")[0].state_dict()[KEY][:99].clone(), "does not read as a rule's state"),
    "another dtype": (lambda: torch.zeros(3), r"uint8 tensor \(bytes,\), got a Tensor float32 \(3,\)"),
}


@pytest.mark.parametrize(("state", "message"), MISFITS.values(), ids=MISFITS.keys())
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state, message):
    model, _ = build("importance")
    train(model, None, range(2))
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=f"(?s){KEY} does not fit this cut: .*{message}"):
        model.load_state_dict({**before, KEY: state()})
    assert torch.equal(model.state_dict()[KEY], before[KEY])
    with pytest.raises(ValueError, match=message):
        model[2].set_extra_state(state())


def test_a_cut_without_memory_loads_a_checkpoint_of_one_without_a_cut():
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Identity(), nn.Linear(8, 5))
    model, _ = build("random", generator=False)
    model.load_state_dict(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert same(plain, model)
