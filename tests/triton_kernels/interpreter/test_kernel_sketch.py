"""The sketch's kernel against the specification, in the interpreter."""

import importlib

import kernel_cases as cases
import pytest
import torch

from selbp import ops, reference
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.sketch import projected_residuals

operator = importlib.import_module("selbp.ops.sketch")
POINTER, DESCRIPTOR = Tile(32, 32, 16), Tile(32, 32, 16, descriptor=True)


def exact(case, projection):
    stats = reference.linear_cross_entropy_statistics(
        case.features, case.weight, case.bias, case.target, **case.options
    )
    logits = torch.nn.functional.linear(case.features, case.weight, case.bias)
    r = reference.residual(logits, case.target, stats.lse, **case.options)
    y = case.target.clamp(min=0)[:, None]
    capped = reference.soft_cap(logits, case.options.get("softcap", 0.0)).scatter(1, y, -torch.inf)
    return stats, torch.exp(torch.logsumexp(capped, 1) - stats.lse), r @ projection.to(r.dtype)


def check(case, tile, p=20, splits=None):
    projection, _ = ops.sketch_projections(len(case.weight), 1, (p, 1), dtype=case.features.dtype)
    stats, others, spec = exact(case.to(torch.float64), projection)
    _, _, eager = exact(case.to(torch.float32), projection)
    options = {name: case.options.get(name, 0.0) for name in ("label_smoothing", "softcap")}
    got = projected_residuals(
        stats.valid.float(), case.features, case.weight, case.bias, case.target, stats.lse, others, projection,
        case.options.get("class_weight"), **options, tile=tile, splits=splits,
    )  # fmt: skip
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
    got = operator._cuda(features, case.weight, case.bias, target, *projections, *options)
    wide = case.to(torch.float64)
    spec = reference.sketch(
        wide.features.view(4, 6, 16), wide.weight, wide.bias, target, *(p.double() for p in projections),
        **wide.options,
    )  # fmt: skip
    assert got.shape == spec.shape
    assert float((got - spec).abs().max() / spec.abs().max()) < 1e-5
