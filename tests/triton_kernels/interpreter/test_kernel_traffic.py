"""The bytes that the kernels request equal the formulas of the roofline, byte for byte; so do the flops of products."""

import pytest
import torch
from support import kernel_cases as cases
from support import triton_guard

from benchmarks import roofline_gpu as roofline
from selbp.triton_kernels.combine import finalize
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.gram import CLEAR_ROWS, gram
from selbp.triton_kernels.linear_cross_entropy import residual_chunk, row_terms
from selbp.triton_kernels.residual import residual
from selbp.triton_kernels.statistics import logits_statistics, statistics
from selbp.triton_kernels.target_logit import target_logit

DTYPES = [torch.float32, torch.bfloat16]


def measure(work):
    triton_guard.traffic.reset()
    result = work()
    return result, triton_guard.traffic.load_bytes + triton_guard.traffic.store_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics(dtype):
    n, d, n_classes, item = 70, 32, 203, dtype.itemsize
    case = cases.make(n, d, n_classes, dtype)
    (z, square), counted = measure(
        lambda: target_logit(case.target, n_classes, features=case.features, weight=case.weight)
    )
    assert counted == roofline.target_logit_requests(n, d, item)
    head, tile = (case.features, case.weight, None, case.target), Tile(32, 64, 16)
    (partials, _), counted = measure(lambda: statistics(*head, tile=tile, splits=2))
    assert partials.shape == (3, 2, n)
    assert counted == roofline.statistics_requests(n, n_classes, d, 2, (32, 64), item)
    assert triton_guard.traffic.dot_flops == 2 * 3 * 32 * 4 * 64 * d  # 3 row tiles, 4 class tiles, whole
    _, counted = measure(lambda: finalize(partials, z, square, case.target, n_classes))
    assert counted == roofline.finalize_requests(n, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stored_logits(dtype):
    n, n_classes, item = 37, 203, dtype.itemsize
    case = cases.make(n, 8, n_classes, dtype)
    logits, tile = case.logits, Tile(4, 64, 0)
    partials, counted = measure(lambda: logits_statistics(logits, case.target, tile=tile, splits=2))
    assert counted == roofline.logits_statistics_requests(n, n_classes, partials.shape[1], item)
    lse = torch.logsumexp(logits.float(), 1)
    case.target[:] = 3
    _, counted = measure(lambda: residual(logits, case.target, lse, tile=tile, splits=2))
    assert counted == roofline.residual_requests(n, n_classes, 2, item)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gram(dtype):
    n, n_classes, d = 70, 48, 32
    x, h = torch.randn(n, n_classes).to(dtype), torch.randn(n, d).to(dtype)
    _, counted = measure(lambda: gram(x, h, tile=Tile(32, 32, 16)))
    assert counted == roofline.gram_requests(n, n_classes, d, 32, dtype.itemsize, CLEAR_ROWS)
    assert triton_guard.traffic.dot_flops == 6 * 2 * 32 * 32 * (n_classes + d)  # 6 tiles of the triangle


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_chunk_of_residuals(dtype):
    n, d, n_classes, item, tile = 70, 32, 203, dtype.itemsize, Tile(32, 64, 16)
    case = cases.make(n, d, n_classes, dtype)
    ones = torch.ones(n)
    rows = row_terms(ones, case.target, ones, ones, None, 0.0, n_classes)
    out = torch.empty(n, n_classes, dtype=dtype)
    _, counted = measure(lambda: residual_chunk(out, case.features, case.weight, None, None, rows, 0, tile=tile))
    assert counted == roofline.chunk_requests(n, n_classes, d, (32, 64), item)
    assert triton_guard.traffic.dot_flops == 2 * 3 * 32 * 4 * 64 * d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_with_a_projection(dtype):
    n, d, n_classes, p, item, tile = 70, 32, 203, 20, dtype.itemsize, Tile(32, 64, 16)
    case, projection = cases.make(n, d, n_classes, dtype), torch.randn(n_classes, p).to(dtype)
    (_, sums), counted = measure(
        lambda: statistics(case.features, case.weight, None, case.target, projection=projection, tile=tile, splits=2)
    )
    assert sums.shape == (1, 2, n, p)
    assert counted == roofline.sketch_requests(n, n_classes, d, p, 2, (32, 64), item)
    assert triton_guard.traffic.dot_flops == 2 * 3 * 32 * 4 * 64 * (d + 64)  # the projection padded to 64 columns


def test_the_model_is_above_the_roofline():
    for work in roofline.SHAPES:
        for device in roofline.DEVICES.values():
            assert 0.0 < roofline.roofline(work, device) < roofline.modelled(work, device)
