"""The Gram kernel against the specification, in the interpreter."""

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels.configs import TABLE, Tile
from selbp.triton_kernels.gram import gram

POINTER, DESCRIPTOR = Tile(32, 32, 16), Tile(32, 32, 16, descriptor=True)


def check(residual, features, bias=True, tile=POINTER):
    spec = reference.gradient_gram(residual.double(), features.double(), bias=bias)
    eager = reference.gradient_gram(residual.float(), features.float(), bias=bias)
    got = gram(residual, features, bias=bias, tile=tile)
    # An entry is a sum of products of either sign: its error is measured against the norms that it multiplies.
    norm = spec.diagonal().clamp_min(1e-30).sqrt()
    scale = torch.outer(norm, norm)
    cases.assert_close("gram", (got / scale).float(), spec / scale, eager / scale, smallest=1.0)
    assert torch.equal(got, got.T)
    return got


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(70, 45, 29), (64, 64, 32), (1, 1, 1), (33, 100, 16), (129, 10, 5)])
def test_shapes(shape, bias):
    n, n_classes, d = shape
    check(torch.randn(n, n_classes), torch.randn(n, d), bias)


@pytest.mark.parametrize("tile", [POINTER, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("features_dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", cases.DTYPES, ids=str)
def test_dtypes(residual_dtype, features_dtype, tile):
    check(torch.randn(40, 48).to(residual_dtype), torch.randn(40, 24).to(features_dtype), tile=tile)


def test_broken_rows_count_as_zero():
    residual, features = torch.randn(70, 45), torch.randn(70, 29)
    clean = check(residual, features)
    residual[3, 7], features[40, 1], residual[69, 0] = torch.nan, torch.inf, -torch.inf
    residual[5] = 0.0
    features[5, 3] = torch.nan
    got = check(residual, features)
    bad = torch.tensor([3, 5, 40, 69])
    keep = torch.ones(70, dtype=torch.bool).index_fill(0, bad, False)
    assert (got[bad] == 0).all() and (got[:, bad] == 0).all()
    assert torch.equal(got[keep][:, keep], clean[keep][:, keep])


def test_a_finite_row_that_overflows_stays():
    residual, features = torch.randn(40, 45), torch.randn(40, 29)
    residual[7], features[9, 2] = 1e25, torch.nan
    got = gram(residual, features, tile=POINTER)
    assert got[7, 7] == torch.inf
    assert (got[9] == 0).all()


def test_rows_of_a_wider_matrix():
    wide = torch.randn(37, 100)
    check(wide[:, :45], wide[:, 50:79])


def test_empty_batch():
    assert gram(torch.empty(0, 4), torch.empty(0, 3)).shape == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["gram", "gram_small"])
@pytest.mark.parametrize("arch", TABLE)
def test_shipped_tiles(arch, kernel):
    for dtype in cases.DTYPES:
        check(torch.randn(150, 101).to(dtype), torch.randn(150, 77).to(dtype), tile=TABLE[arch][kernel][dtype.itemsize])
