"""The sketch's kernel against the specification, in the interpreter."""

import importlib

import pytest
import torch
from support import kernel_cases as cases

from selbp import ops, reference
from selbp.triton_kernels.configs import TABLE, Tile
from selbp.triton_kernels.sketch import projected_residuals

operator = importlib.import_module("selbp.ops.sketch")
POINTER, DESCRIPTOR = Tile(32, 32, 16), Tile(32, 32, 16, descriptor=True)


def exact(case, projection):
    stats = reference.linear_cross_entropy_statistics(
        case.features, case.weight, case.bias, case.target, **case.options
    )
    logits = torch.nn.functional.linear(case.features, case.weight, case.bias)
    r = reference.residual(logits, case.target, stats.lse, **case.options)
    return stats.valid, torch.where(stats.valid[:, None], r @ projection.to(r.dtype), 0.0)


def check(case, tile, p=20, splits=None):
    projection, _ = ops.sketch_projections(len(case.weight), 1, (p, 1), dtype=case.features.dtype)
    valid, spec = exact(case.to(torch.float64), projection)
    _, eager = exact(case.to(torch.float32), projection)
    got, flags = projected_residuals(
        case.features, case.weight, case.bias, case.target, projection, **case.options, tile=tile, splits=splits
    )
    assert torch.equal(flags, valid)
    size = max(float(spec.abs().max()), 1e-30)
    unit = 0.0 if case.features.dtype == torch.float32 else torch.finfo(case.features.dtype).eps  # of r, once
    ours, theirs = (float((x.double() - spec).abs().max()) / size for x in (got, eager))
    assert ours <= 2.0 * theirs + 2 * cases.ULP + unit, f"{ours:.2e}, eager's {theirs:.2e}"


@pytest.mark.parametrize("tile", [POINTER, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_every_option(option, tile):
    check(cases.make(37, 24, 203, option=option, bias=True), tile, splits=3)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_dtypes(dtype):
    check(cases.make(37, 24, 203, dtype, "everything"), DESCRIPTOR)


@pytest.mark.parametrize(("shape", "p"), [((1, 1, 1), 1), ((5, 9, 7), 3), ((33, 16, 64), 100)])
def test_odd_shapes(shape, p):
    check(cases.make(*shape), POINTER, p)


@pytest.mark.parametrize("bias", [False, True])
def test_the_operator_on_cuda_implementations(bias):
    case = cases.make(24, 16, 90, option="everything", bias=bias)
    projections = ops.sketch_projections(90, 16 + bias, (8, 6))
    features, target = case.features.view(4, 6, 16), case.target.view(4, 6)
    options = (case.options["class_weight"], -100, 0.2, 7.0)
    got = operator._cuda(*operator._pack(features, case.weight, case.bias, target, *projections, *options))
    wide = case.to(torch.float64)
    spec = reference.sketch(
        wide.features.view(4, 6, 16),
        wide.weight,
        wide.bias,
        target,
        *(p.double() for p in projections),
        **wide.options,
    )
    assert got.shape == spec.shape
    assert float((got - spec).abs().max() / spec.abs().max()) < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_broken_rows_leave_the_others_as_they_are(option, bad):
    case = cases.make(20, 16, 90, option=option, bias=True)
    case.target[:] = torch.arange(20)
    projection, _ = ops.sketch_projections(90, 1, (8, 1))

    def run():
        arguments = case.features, case.weight, case.bias, case.target, projection
        return projected_residuals(*arguments, **case.options, tile=POINTER, splits=2)

    clean, before = run()
    case.features[3, 2], case.target[5], case.target[6] = bad, -100, 90
    got, valid = run()
    rows = torch.tensor([3, 5, 6])
    assert before.all() and not valid[rows].any() and (got[rows] == 0).all()
    others = torch.ones(20, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(got[others], clean[others])
    case.features[:] = bad
    got, valid = run()
    assert not valid.any() and (got == 0).all()


def test_a_confident_row_keeps_its_small_residual():
    """1 - p_y near 1e-9: the sums are relative to the other classes' greatest, so nothing is lost beside p_y."""
    bias = torch.zeros(50)
    bias[7] = 25.0
    projection, _ = ops.sketch_projections(50, 1, (8, 1))
    case = cases.Case(torch.zeros(2, 4), torch.randn(50, 4), bias, torch.full((2,), 7), {})
    _, spec = exact(case.to(torch.float64), projection)
    got, _ = projected_residuals(case.features, case.weight, bias, case.target, projection, tile=POINTER, splits=2)
    assert 0 < float(spec.abs().max()) < 1e-8
    assert float((got - spec).abs().max() / spec.abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("option", cases.OPTIONS)
@pytest.mark.parametrize("arch", TABLE)
def test_shipped_tiles(arch, option):
    for dtype in cases.DTYPES:
        key = {"softcap": "sketch_softcap", "plain": "sketch", "weight": "sketch"}.get(option, "sketch_smoothing")
        table = TABLE[arch][key]
        check(cases.make(130, 72, 523, dtype, option, bias=True), table[dtype.itemsize], 64)
