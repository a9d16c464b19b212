"""The operators that save a step's launches on a GPU, on the CPU: the same step as by torch's operators one by one."""

import pytest
import torch
from torch import nn

import selbp
from selbp.common import batch
from selbp.ops.minibatch import unscored, weighted_loss
from selbp.training import kinds, losses, scoring

MODULES = (batch, kinds, losses, scoring)
RULES = {
    "random": selbp.Random,
    "full": selbp.Full,
    "top loss": selbp.TopLoss,
    "gradient norm": selbp.GradNormImportance,
    "percentile": selbp.LossPercentile,
    "matching": selbp.GradientMatching,
    "diverse": selbp.DivBS,
}
OPTIONS = {
    "plain": {},
    "weights, smoothing": {"class_weight": torch.linspace(0.0, 1.5, 4), "label_smoothing": 0.1, "ignore_index": 3},
    "full head": {"head_gradient": "full", "ignore_index": 2},
}


def minibatch(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 6, generator=generator, dtype=dtype)
    if seed == 0:  # in the other every row is valid, and no factor is masked
        x[5, 2], x[9, 0] = torch.nan, torch.inf
    return x, torch.randint(0, 4, (24,), generator=generator)


def trained(rule, dtype, backward, options, fused, at_once, monkeypatch):
    """Losses, gradients and reports of two steps."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "scores_at_once", lambda device: at_once)
        for module in MODULES:
            patch.setattr(module, "saves_launches", lambda device: fused)
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
        generator = torch.Generator().manual_seed(3)
        step = selbp.SelectiveBackprop(
            model, selector=rule(), keep=10, backward=backward, generator=generator, **options
        )
        for seed in range(2):
            loss = step(*minibatch(dtype, seed))
            loss.backward()
            report = step.report
            found += [loss.detach(), report.selection.weights, report._stats.loss, report._stats.residual_sq]
            found += [torch.tensor([report.loss, report.accuracy]), report._chosen]
            found += [report.selection.indices, report._stats.valid, report._stats.correct]
            found += [parameter.grad.clone() for parameter in model.parameters()]
            relative = report.relative_residual
            found += [torch.tensor(torch.nan if relative is None else relative)]
    return found


@pytest.mark.parametrize("backward", ["recompute", "rows"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("fused", [True, False], ids=["as a GPU's", "as a CPU's"])
def test_the_same_step(fused, rule, options, backward, monkeypatch):
    step = rule, torch.float64, backward, options
    one_by_one = trained(*step, False, False, monkeypatch)
    for ours, expected in zip(trained(*step, fused, True, monkeypatch), one_by_one, strict=True):
        assert ours.dtype == expected.dtype or expected.dtype == torch.float32
        assert torch.allclose(ours.double(), expected.double(), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_a_label_that_does_not_fit_is_refused_before_the_forward(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "saves_launches", lambda device: True)
    ran = []
    model = nn.Sequential(nn.Linear(6, 4))
    model.register_forward_hook(lambda *_: ran.append(1))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=3, backward="recompute")
    with pytest.raises(TypeError, match="target must be int64"):
        step(torch.randn(8, 6), torch.zeros(8, dtype=torch.int32))
    assert not ran


def test_the_gradient_of_the_weighted_loss():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    scale, weights = torch.tensor(1.5, dtype=torch.float64), torch.rand(9, generator=generator, dtype=torch.float64)
    weights[::4] = 0.0
    assert torch.autograd.gradcheck(lambda x: weighted_loss(x, scale, weights)[0], values)
    assert torch.autograd.gradgradcheck(lambda x: weighted_loss(x.square(), scale, weights)[0], values)
    spoiled = torch.where(weights == 0, torch.nan, values.detach()).requires_grad_()
    loss, scaled = weighted_loss(spoiled, scale, weights)
    loss.backward()
    assert torch.allclose(spoiled.grad, scale * weights) and loss.isfinite() and not scaled.requires_grad
    tangent = torch.ones(9, dtype=torch.float64)
    slope = torch.func.jvp(lambda x: weighted_loss(x, scale, weights)[0], (values.detach(),), (tangent,))[1]
    assert torch.allclose(slope, (scale * weights).sum())


def test_no_unit_without_a_valid_row():
    target = torch.full((3,), -100)
    mass, valid, never, unknown, scale = unscored(target, torch.ones(3, dtype=torch.bool), None, -100, True)
    assert not mass.any() and not valid.any() and not never.any() and unknown.isnan().all() and scale == 0
    assert unknown.dtype == torch.float64
