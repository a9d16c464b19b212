import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.factors import DTYPES, draw, output_dtype, unit, with_bias

from selbp import _native, ops, reference

SHAPES = [
    (0, 3, 4),
    (1, 1, 1),
    (2, 1, 5),
    (5, 7, 1),
    (63, 10, 12),
    (65, 3, 9),
    (128, 10, 128),
    (129, 33, 65),
    (300, 100, 40),
    (70, 128, 129),  # where the native kernel's stretches of terms end
    (64, 500, 0),
]


def check_gram(gram, residual, features, bias):
    """The result meets the rounding bound of its accumulation; reads nothing but the definition."""
    got = gram(residual, features, bias=bias)
    r, h = residual.double(), with_bias(features, bias)
    exact = (r @ r.t()) * (h @ h.t())
    scale = (r.abs() @ r.abs().t()) * (h.abs() @ h.abs().t())
    bound = (r.shape[1] + h.shape[1] + 4) * unit(residual.dtype) * scale  # two dot products and three roundings
    assert got.shape == exact.shape and got.dtype == output_dtype(residual.dtype) and not got.requires_grad
    assert ((got.double() - exact).abs() <= bound).all()
    assert torch.equal(got, got.t())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, dtype, bias, device):
    residual, features = (x.to(device) for x in draw(*shape, dtype))
    check_gram(ops.gradient_gram, residual, features, bias)
    exact = reference.gradient_gram(residual.double(), features.double(), bias=bias)
    assert torch.allclose(ops.gradient_gram(residual, features, bias=bias).double(), exact, rtol=1e-3, atol=1e-4)


@hypothesis.given(st.integers(0, 150), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_shape(n, n_classes, d, bias, seed):
    check_gram(ops.gradient_gram, *draw(n, n_classes, d, seed=seed), bias)


def test_every_thread_count_gives_the_same_bits():
    residual, features = draw(700, 120, 130)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.gradient_gram(residual, features))
    finally:
        torch.set_num_threads(before)
    check_gram(lambda *_, bias: results[0], residual, features, True)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scales", [(1e15, 1.0), (1e-15, 1.0), (1e15, 1e-15), (1e-15, 1e15)], ids=str)
def test_scales(dtype, scales):
    residual, features = draw(140, 10, 20, dtype)
    check_gram(ops.gradient_gram, residual * scales[0], features * scales[1], False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_row_that_is_not_finite_counts_as_zero_and_spoils_no_other(value, which):
    factors = list(draw(200, 10, 12))
    clean = ops.gradient_gram(*factors)
    factors[which][[3, 130]] = torch.where(torch.arange(factors[which].shape[1]) == 2, value, factors[which][[3, 130]])
    got = ops.gradient_gram(*factors)
    kept = torch.ones(200, dtype=torch.bool)
    kept[[3, 130]] = False
    assert (got[~kept] == 0).all() and (got[:, ~kept] == 0).all()
    assert torch.equal(got[kept][:, kept], clean[kept][:, kept])
    assert torch.allclose(got.double(), reference.gradient_gram(*(x.double() for x in factors)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(200, 10, 12), (130, 7, 33), (65, 1, 300), (64, 129, 1)], ids=str)
def test_bfloat16_pairs_give_what_widened_factors_give(shape, monkeypatch):
    """In pairs where the processor multiplies them, else widened: both meet the bound, and neither spreads a NaN."""
    if not _native.multiplies_bfloat16():
        pytest.skip("needs AVX512-BF16, at the level v4")
    factors = list(draw(*shape, torch.bfloat16))
    check_gram(ops.gradient_gram, *factors, True)
    clean = ops.gradient_gram(*factors)
    for which, value in ((0, torch.nan), (1, torch.inf)):
        spoiled = list(factors)
        spoiled[which] = spoiled[which].clone()
        spoiled[which][3, -1] = value
        got = ops.gradient_gram(*spoiled)
        kept = torch.arange(len(got)) != 3
        assert (got[3] == 0).all() and (got[:, 3] == 0).all()
        assert torch.equal(got[kept][:, kept], clean[kept][:, kept])
    pairs, calls = _native.gram_pairs, []
    monkeypatch.setattr(_native, "gram_pairs", lambda *a: (calls.append(a), pairs(*a))[1])
    assert torch.equal(ops.gradient_gram(*factors), clean) and len(calls) == 1
    monkeypatch.setattr(_native, "multiplies_bfloat16", lambda: False)
    check_gram(ops.gradient_gram, *factors, True)
    assert len(calls) == 1


def test_overflow_of_finite_factors_stays_visible():
    got = ops.gradient_gram(torch.full((3, 2), 1e15), torch.full((3, 2), 1e15))
    assert torch.isinf(got).all()


def test_zero_residual_meets_infinite_features():
    got = ops.gradient_gram(torch.zeros(2, 3), torch.tensor([[torch.inf], [1.0]]))
    assert (got == 0).all()
