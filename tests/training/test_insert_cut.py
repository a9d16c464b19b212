"""A cut placed by a hook: the gradients of a cut in the model, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, samples
from torch import nn
from torch.nn import functional as F

import selbp


def parts():
    torch.manual_seed(3)
    return nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Linear(8, 5)


def test_it_is_the_cut_that_a_module_would_be():
    for at, place in (("output", "2"), ("input", "3")):
        x, y = samples()
        first, tanh, middle, last = parts()
        model = nn.Sequential(first, tanh, middle, last)
        cut = selbp.insert_cut(model, place, keep=0.25, at=at)
        got = gradients(model, F.cross_entropy(model(x), y))
        again = [copy.deepcopy(part) for part in (first, tanh, middle, last)]
        for part in again:
            part._forward_hooks.clear(), part._forward_pre_hooks.clear()
        module = selbp.BackwardCut(0.25)
        inner = nn.Sequential(*again)

        def forward(x, inner=inner, module=module, at=at):
            below = inner[1](inner[0](x))
            hidden = inner[2](below)
            return inner[3](module(hidden, below) if at == "output" else module(hidden))

        assert_same(got, gradients(inner, F.cross_entropy(forward(x), y)), 1e-6)
        assert cut.report.selection.indices.tolist() == module.report.selection.indices.tolist()
        assert (cut.report.n, cut.report.k) == (24, 6)


@pytest.mark.parametrize("at", ["output", "input"])
def test_the_model_is_as_it_was_but_for_its_backward(at):
    model, (x, y) = nn.Sequential(*parts()), samples()
    keys, modules, plain = list(model.state_dict()), list(model.named_modules()), model(x)
    whole = gradients(model, F.cross_entropy(model(x), y))
    cut = selbp.insert_cut(model, model[2], keep=0.25, at=at)
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    assert torch.equal(model(x), plain)
    model.eval()
    assert_same(gradients(model, F.cross_entropy(model(x), y)), whole, 0)
    with pytest.raises(RuntimeError, match="no report before the first backward"):
        cut.report  # noqa: B018
    model.train()
    got = gradients(model, F.cross_entropy(model(x), y))
    assert not torch.allclose(got["0.weight"], whole["0.weight"], rtol=1e-2)
    assert torch.equal(got["3.weight"], whole["3.weight"])
    assert torch.equal(got["2.weight"], whole["2.weight"]) == (at == "input")
    cut.remove(), cut.remove()
    assert_same(gradients(model, F.cross_entropy(model(x), y)), whole, 0)


def test_tied_weights_and_sequences():
    model = TokenModel(vocabulary=11, width=8)
    model.head.weight = model.embed.weight
    cut = selbp.insert_cut(model, "head", keep=2, at="input")
    ids = torch.randint(0, 11, (8, 6))
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    assert cut.report.k == 2 and model.head.weight is model.embed.weight


class Tupled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(input=self.layer(x)[0])


@pytest.mark.parametrize(("place", "at"), [("layer", "output"), ("head", "input")])
def test_a_tuple_and_a_keyword(place, at):
    model = Tupled()
    cut = selbp.insert_cut(model, place, keep=0.5, at=at)
    model(torch.randn(8, 5, 4)).square().mean().backward()
    assert cut.report.k == 4


def test_copies_and_pickles_have_a_cut_of_their_own():
    model, (x, y) = nn.Sequential(*parts()), samples()
    cut = selbp.insert_cut(model, "2", keep=0.25)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        got = gradients(other, F.cross_entropy(other(x), y))
        with pytest.raises(RuntimeError):
            cut.report  # noqa: B018
        assert got["0.weight"].abs().sum() > 0
    assert_same(got, gradients(model, F.cross_entropy(model(x), y)), 1e-6)


def test_its_state_goes_on_bit_for_bit():
    x, y = samples()
    chosen = []
    state = None
    for resumed in (False, True):
        model = nn.Sequential(*parts())
        cut = selbp.insert_cut(model, "2", keep=0.25, selector=selbp.Random(), generator=torch.Generator())
        if resumed:
            cut.load_state_dict(state)
        for step in range(3 if not resumed else 2):
            if step == 1 and not resumed:
                state = cut.state_dict()
            F.cross_entropy(model(x), y).backward()
            chosen.append(cut.report.selection.indices.tolist())
    assert chosen[1:3] == chosen[3:]
    with pytest.raises(ValueError, match="state must have the entries"):
        cut.load_state_dict({})


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_compiled_model(ran_before):
    torch.compiler.reset()
    model, (x, y) = nn.Sequential(*parts()), samples()
    compiled = torch.compile(model, backend="eager")
    if ran_before:
        F.cross_entropy(compiled(x), y).backward()
    cut = selbp.insert_cut(compiled, "2", keep=0.25)
    got = gradients(model, F.cross_entropy(compiled(x), y))
    assert cut.report.k == 6
    assert_same(got, gradients(model, F.cross_entropy(model(x), y)), 1e-6)


@pytest.mark.parametrize(
    ("place", "options", "error", "words"),
    [
        ("9", {}, ValueError, "place='9' names no module of the model; it has 0, 1, 2, 3"),
        ("", {}, ValueError, "names no module"),
        (nn.Linear(2, 2), {}, ValueError, "must be a module of the model, or its name, got another Linear"),
        (3, {}, TypeError, "place must be a module of the model or its name, got 3"),
        ("2", {"at": "middle"}, ValueError, "at must be one of 'output', 'input'"),
        ("2", {"keep": 0}, ValueError, "keep must be"),
        ("2", {"selector": selbp.TopLoss()}, ValueError, "reads per-sample losses"),
    ],
    ids=["name", "empty", "another", "number", "at", "keep", "rule"],
)
def test_a_wrong_call_leaves_the_model_alone(place, options, error, words):
    model = nn.Sequential(*parts())
    with pytest.raises(error, match=words):
        selbp.insert_cut(model, place, **({"keep": 0.25} | options))
    assert not model[2]._forward_hooks and not model[2]._forward_pre_hooks
    with pytest.raises(TypeError, match="model must be"):
        selbp.insert_cut("model", "2", keep=0.25)


@pytest.mark.parametrize("how", ["scripted", "traced", "scripted inside"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_module_that_torchscript_runs_is_refused_by_name(how: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    if how == "traced":
        model = torch.jit.trace(model, torch.randn(2, 4))
    elif how == "scripted":
        model = torch.jit.script(model)
    else:
        model[2] = torch.jit.script(model[2])
    with pytest.raises(TypeError, match="place must be a module that runs in Python"):
        selbp.insert_cut(model, "2", keep=0.25)
    for argument in ("head", "cut"):
        with pytest.raises(TypeError, match=f"{argument} must be a module that runs in Python"):
            selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, **{argument: "2"})
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)  # needs no hook
    step(torch.randn(8, 4), torch.arange(8) % 3).backward()
    assert step.report.k == 2
