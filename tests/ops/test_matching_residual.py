import pytest
import torch
from support.factors import DTYPES, draw, with_bias

from selbp import ops, reference
from selbp.ops import Selection

MODULE = __import__("selbp.ops.matching_residual", fromlist=["_BLOCK"])


def choose(n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Selection(torch.randperm(n, generator=generator)[:k], torch.rand(k, generator=generator) / max(k, 1))


def check(operator, residual, features, selection, bias):
    """Equal to the definition up to float64 rounding of sums over n and over k."""
    got = operator(residual, features, selection, bias=bias)
    r, h = residual.double(), with_bias(features, bias)
    a = torch.full((len(r),), 1.0 / max(len(r), 1), dtype=torch.float64, device=r.device)
    size = (r.abs() * a[:, None]).t() @ h.abs()
    mean = (r * a[:, None]).t() @ h
    taken = selection.indices >= 0
    a.index_add_(0, selection.indices[taken], -selection.weights[taken].double())
    exact = ((r * a[:, None]).t() @ h).norm() / mean.norm()
    weight = 1 + float(selection.weights.abs().sum())
    slack = 4 * (len(r) + len(taken) + r.shape[1] * h.shape[1]) * 2.0**-52 * weight * size.norm() / mean.norm()
    assert got.dtype == torch.float64 and got.shape == () and not got.requires_grad
    assert abs(got - exact) <= slack * (1 + exact)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 2, 1, 1), (2, 1, 5, 0), (5, 7, 1, 3), (64, 10, 12, 16), (300, 100, 40, 75)], ids=str
)
def test_matches_the_definition(shape, dtype, bias, device):
    residual, features = (x.to(device) for x in draw(*shape[:3], dtype))
    selection = Selection(*(x.to(device) for x in choose(shape[0], shape[3])))
    check(ops.matching_residual, residual, features, selection, bias)
    wanted = reference.matching_residual(residual, features, *selection, bias=bias)
    assert torch.allclose(ops.matching_residual(residual, features, selection, bias=bias), wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("block", [1, 40, 1000, 1 << 21])
def test_blocks_of_classes_do_not_change_it(monkeypatch, block):
    monkeypatch.setattr(MODULE, "_BLOCK", block)
    monkeypatch.setattr(MODULE, "is_small", lambda *_: False)
    check(ops.matching_residual, *draw(30, 33, 20), choose(30, 8), True)


def test_certifies_what_a_float32_gram_cannot():
    residual, features = draw(200, 10, 12)
    every = Selection(torch.arange(200), torch.full((200,), 1 / 200, dtype=torch.float64))
    assert ops.matching_residual(residual, features, every) < 1e-14
    gram, mean = ops.gradient_gram(residual, features), ops.mean_gradient(residual, features)
    w = every.weights.float()
    squared = mean.target_sq - 2 * w @ mean.inner + w @ gram @ w
    assert squared.abs().sqrt() / mean.target_sq.sqrt() > 1e-6


def test_empty_slots_and_repeats():
    residual, features = draw(20, 5, 6)
    plain = ops.matching_residual(residual, features, Selection(torch.tensor([4, 9]), torch.tensor([0.5, 0.25])))
    padded = Selection(torch.tensor([4, -1, 9, 4, -1]), torch.tensor([0.25, torch.nan, 0.25, 0.25, 7.0]))
    assert torch.allclose(ops.matching_residual(residual, features, padded), plain, rtol=1e-12)
    nothing = Selection(torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert ops.matching_residual(residual, features, nothing) == 1.0


def test_a_matching_of_the_solver():
    residual, features = draw(60, 5, 6)
    mean = ops.mean_gradient(residual, features)
    matching = ops.match(ops.gradient_gram(residual, features), mean.inner, mean.target_sq, 12)
    certified = ops.matching_residual(residual, features, matching)
    assert abs(certified - matching.residual) < 1e-3 and certified < 0.9


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("row", [3, 7])
def test_a_row_that_is_not_finite_counts_as_zero(value, which, row):
    factors = list(draw(20, 5, 6))
    factors[which][row, 2] = value
    selection = Selection(torch.tensor([3, 5, 3]), torch.tensor([0.5, 0.5, 0.0]))
    wanted = reference.matching_residual(*factors, *selection)
    assert torch.isfinite(wanted)
    assert torch.allclose(ops.matching_residual(*factors, selection), wanted, rtol=1e-12)


@pytest.mark.parametrize("scales", [(1e15, 1.0), (1e-15, 1.0), (1e15, 1e15), (1e-15, 1e-15)], ids=str)
def test_is_free_of_scale(scales):
    residual, features = draw(40, 5, 6)
    plain = ops.matching_residual(residual, features, choose(40, 10), bias=False)
    scaled = ops.matching_residual(residual * scales[0], features * scales[1], choose(40, 10), bias=False)
    assert torch.allclose(scaled, plain, rtol=1e-6)  # the inputs themselves were rounded anew


def test_undefined_where_the_mean_is_zero():
    assert torch.isnan(ops.matching_residual(torch.zeros(3, 2), torch.ones(3, 2), choose(3, 2)))
    assert torch.isnan(ops.matching_residual(torch.zeros(0, 2), torch.ones(0, 2), choose(0, 0)))
