"""The scoring forward leaves no trace, and under "same" batch norm sees each minibatch once."""

import copy

import pytest
import torch
from support.training_kit import assert_same_state, samples
from torch import nn

import selbp


class Noisy(nn.Module):
    """Batch norm, dropout that its mode switches, noise that it does not, and a frozen sub-module."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
        self.frozen = nn.BatchNorm1d(16).eval()
        self.head = nn.Linear(16, 5)
        self.fail_at = None
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.frozen(self.body(x)) + torch.rand(()) * 0
        z = self.head(h)
        if self.calls == self.fail_at:
            raise RuntimeError("in the model")
        return z


def build(model, selector=None, **options):
    options.setdefault("backward", "recompute")
    return selbp.SelectiveBackprop(model, selector=selector or selbp.GradientMatching(), keep=0.5, **options)


def modes(model):
    return [m.training for m in model.modules()]


def buffers(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same_buffers(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("selector", [selbp.TopLoss(), selbp.TopGradNorm(), selbp.GradientMatching()])
def test_eval_scoring_leaves_no_trace(selector):
    x, y = samples()
    model = Noisy()
    before = modes(model)
    step = build(model, selector, scoring="eval")
    seen = {}

    def at_training_forward(module, args):
        if model.calls == 2 and not seen:
            seen.update(state=torch.get_rng_state(), buffers=buffers(model), modes=modes(model))

    model.register_forward_pre_hook(at_training_forward)
    model.body[0].register_forward_pre_hook(at_training_forward)
    start, state = buffers(model), torch.get_rng_state()
    step(x, y)
    assert torch.equal(seen["state"], state) and same_buffers(seen["buffers"], start) and seen["modes"] == before
    assert modes(model) == before
    assert not same_buffers(buffers(model), start)  # the forward of the k rows follows them
    assert model.body[1].num_batches_tracked == 1
    count = model.calls  # the first step looked whether samples interact
    step(x, y)
    assert model.calls == count + 2


def test_same_scoring_updates_batch_norm_once_with_all_rows():
    x, y = samples()
    model = Noisy()
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    step = build(model)
    step(x, y)
    torch.manual_seed(3)
    twin(x)
    assert same_buffers(buffers(model), buffers(twin))
    count = model.calls
    step(x, y)
    assert model.calls == count + 2


def test_unscored_and_full_steps_update_batch_norm_once():
    x, y = samples()
    for options in ({"selector": selbp.Random()}, {"schedule": selbp.Schedule(start=5)}):
        model = Noisy()
        build(model, **options)(x, y)
        assert model.calls == 1 and model.body[1].num_batches_tracked == 1


@pytest.mark.parametrize("scoring", ["same", "eval"])
@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("head_gradient", ["subset", "full"])
def test_an_exception_restores_everything(scoring, fail_at, head_gradient):
    x, y = samples()
    model = Noisy()
    generator = torch.Generator().manual_seed(5)
    selector = selbp.LossPercentile()
    step = build(model, selector, scoring=scoring, generator=generator, head_gradient=head_gradient)
    step(x, y)
    report, state = step.report, step.state_dict()
    before = modes(model), hooks(model), buffers(model), generator.get_state()
    requires = [p.requires_grad for p in model.parameters()]
    model.fail_at = model.calls + fail_at
    with pytest.raises(RuntimeError, match="in the model"):
        step(x, y)
    assert modes(model) == before[0] and hooks(model) == before[1] and torch.is_grad_enabled()
    assert same_buffers(buffers(model), before[2]) and torch.equal(generator.get_state(), before[3])
    assert [p.requires_grad for p in model.parameters()] == requires
    assert step.report is report and step.optimizer_step == 1
    assert_same_state(step.state_dict(), state)
    model.fail_at = None
    step(x, y)


def test_the_model_is_not_edited():
    x, y = samples()
    model = Noisy()
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    step = build(model, head_gradient="full")
    step(x, y).backward()
    assert hooks(model) == 0
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes


def test_the_generator_decides_and_torch_seed_is_respected():
    x, y = samples()
    model = nn.Sequential(nn.Linear(12, 5))

    def draw(seed=None, generator=None):
        if seed is not None:
            torch.manual_seed(seed)
        step = build(model, selbp.Random(), generator=generator)
        step(x, y)
        return step.report.selection.indices.tolist()

    assert draw(1) == draw(1) != draw(2)
    make = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    assert draw(1, make(7)) == draw(2, make(7)) != draw(1, make(8))
