"""The mean gradient's kernels and the flags of rows that are not finite, in the interpreter."""

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.gram import gram
from selbp.triton_kernels.mean import finite_rows, mean_gradient

SHAPES = [(70, 45, 29), (64, 64, 32), (1, 1, 1), (33, 3, 16), (129, 10, 65), (5, 7, 0)]  # n, C, d


def check(residual, features, bias=True, finite=None):
    def run(dtype):
        found = reference.mean_gradient(residual.to(dtype), features.to(dtype), bias=bias)
        return found if bias else found._replace(head_bias=found.inner.new_empty(0))

    spec, eager = run(torch.float64), run(torch.float32)
    got = mean_gradient(residual, features, finite, bias=bias)
    # Sums of products of either sign: errors are measured against the norms that they multiply.
    mean = spec.target_sq.sqrt().clamp_min(1e-30)
    clean = [x.double().nan_to_num(0, 0, 0) for x in (residual, features)]
    norms = clean[0].square().sum(1) * (clean[1].square().sum(1) + float(bias))
    scale = (norms.max().sqrt() * mean).clamp_min(1e-30)  # |M|^2 moves by 2 |M| times what M does
    cases.assert_close("inner", (got[0] / scale).float(), spec.inner / scale, eager.inner / scale, smallest=1.0)
    cases.assert_close("target_sq", got[1], spec.target_sq, eager.target_sq, smallest=float(scale))
    root = (norms.mean() / max(residual.shape[1], 1)).sqrt().clamp_min(1e-30)
    for name, ours, exact, theirs in zip(("weight", "bias"), got[2:], spec[2:], eager[2:], strict=True):
        cases.assert_close(name, (ours / root).float(), exact / root, theirs / root, smallest=1.0)
    return got


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, bias):
    n, n_classes, d = shape
    torch.manual_seed(n)
    check(torch.randn(n, n_classes), torch.randn(n, d), bias)


@pytest.mark.parametrize("features_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", cases.DTYPES, ids=str)
def test_dtypes(residual_dtype, features_dtype):
    torch.manual_seed(1)
    check(torch.randn(40, 48).to(residual_dtype), torch.randn(40, 24).to(features_dtype))


def test_broken_rows_count_as_zero():
    torch.manual_seed(2)
    residual, features = torch.randn(70, 45), torch.randn(70, 29)
    residual[3, 7], features[40, 1], residual[69, 0] = torch.nan, torch.inf, -torch.inf
    finite = finite_rows(residual, features)
    assert (finite == 0).nonzero()[:, 0].tolist() == [3, 40, 69]
    got = check(residual, features, finite=finite)
    assert (got[0][finite == 0] == 0).all() and all(x.isfinite().all() for x in got)
    flagged = gram(residual, features, tile=Tile(32, 32, 16), finite=finite)
    assert torch.equal(flagged, gram(residual, features, tile=Tile(32, 32, 16)))


def test_rows_that_are_finite_need_no_flags():
    torch.manual_seed(3)
    residual, features = torch.randn(37, 100)[:, :45], torch.randn(37, 60)[:, 31:]
    assert finite_rows(residual, features).all()
    got = check(residual, features)
    flagged = check(residual, features, finite=finite_rows(residual, features))
    assert all(torch.equal(x, y) for x, y in zip(got, flagged, strict=True))
    plain = gram(residual, features, tile=Tile(32, 32, 16), finite=True)
    assert torch.equal(plain, gram(residual, features, tile=Tile(32, 32, 16)))


def test_the_mean_nearly_cancels():
    """Inner products with a mean a thousandth of the gradients keep their float32 accuracy."""
    torch.manual_seed(4)
    half, features = torch.randn(32, 12), torch.ones(64, 8)
    residual = torch.cat([half, -half + 1e-3 * torch.randn(32, 12)])
    check(residual, features)
