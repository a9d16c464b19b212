"""Forward and backward of linear_cross_entropy on the kernels, in the interpreter."""

import importlib

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.linear_cross_entropy import backward

operator = importlib.import_module("selbp.ops.linear_cross_entropy")
POINTER, DESCRIPTOR = Tile(32, 32, 16), Tile(32, 32, 16, descriptor=True)


def inputs(case, scale):
    """The statistics that the backward is given, and the specification's gradients in ``case``'s own dtype."""
    logits = torch.nn.functional.linear(case.features, case.weight, case.bias)
    stats = reference.cross_entropy_statistics(logits, case.target, case.features, **case.options)
    r = reference.residual(logits, case.target, stats.lse, **case.options) * scale.to(logits.dtype)[:, None]
    y = torch.where((case.target >= 0) & (case.target < len(case.weight)), case.target, 0)[:, None]
    capped = reference.soft_cap(logits, case.options.get("softcap", 0.0)).scatter(1, y, -torch.inf)
    p_rest = torch.exp(torch.logsumexp(capped, 1) - stats.lse)
    return stats, p_rest, (r @ case.weight, r.t() @ case.features, r.sum(0))


def check(case, tile, chunk=None):
    scale = torch.rand(len(case.features)).masked_fill_(case.target < 0, 0.0)
    stats, p_rest, spec = inputs(case.to(torch.float64), scale)
    _, _, eager = inputs(case.to(torch.float32), scale)
    options = {name: case.options.get(name, 0.0) for name in ("label_smoothing", "softcap")}
    got = backward(
        scale,
        case.features,
        case.weight,
        case.bias,
        case.target,
        stats.lse,
        p_rest,
        case.options.get("class_weight"),
        **options,
        tile=tile,
        chunk=chunk,
    )
    for name, a, b, c in zip(("features", "weight", "bias"), got, spec, eager, strict=True):
        if a is None:
            assert case.bias is None
            continue
        size = max(float(b.abs().max()), 1e-30)  # one class has no gradient
        low = case.features.dtype != torch.float32
        # The residuals are stored in the inputs' dtype: one rounding of each term, as in eager autograd.
        unit = torch.finfo(case.features.dtype).eps if low else 0.0
        ours = float((a.double() - b).abs().max()) / size
        theirs = float((c.double() - b).abs().max()) / size
        assert ours <= 2.0 * theirs + 2 * cases.ULP + unit, f"{name}: {ours:.2e}, eager's {theirs:.2e}"


@pytest.mark.parametrize("tile", [POINTER, DESCRIPTOR], ids=["pointer", "descriptor"])
@pytest.mark.parametrize("option", cases.OPTIONS)
def test_every_option(option, tile):
    check(cases.make(37, 24, 203, option=option, bias=True), tile, chunk=96)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_dtypes(dtype):
    check(cases.make(37, 24, 203, dtype, "everything", bias=True), DESCRIPTOR)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 9, 2), (33, 16, 64)])
def test_odd_shapes(shape):
    check(cases.make(*shape), POINTER)


def test_confident_rows_keep_their_target_entry():
    """1 - p_y down to 1e-9: the residual is as accurate as the q that the forward kept."""
    logits = torch.zeros(9, 50)
    logits[:, 7] = torch.tensor([50 * 10.0**e for e in range(1, 10)]).log()
    target = torch.full((9,), 7)
    spec = reference.cross_entropy_statistics(logits.double(), target)
    p_rest = -torch.expm1(-spec.loss)
    lse, p_rest = spec.lse[-1:].repeat(9), p_rest[-1:].repeat(9)
    ones, zeros = torch.ones(9, 1), torch.zeros(50, 1)
    _, _, bias = backward(torch.ones(9), ones, zeros, logits[-1].clone(), target, lse, p_rest, None, tile=POINTER)
    exact = reference.residual(logits[-1:].double(), target[:1], spec.lse[-1:])[0] * 9
    assert cases.relative_error(bias[7:8], exact[7:8], 0.0) < 1e-6


def test_rows_without_a_gradient_spoil_none():
    case = cases.make(20, 8, 40)
    case.target[:] = torch.arange(20)
    scale = torch.rand(20)
    stats, p_rest, _ = inputs(case, scale)
    lse, scale = stats.lse.clone(), scale.clone()
    lse[3], p_rest[3], scale[3] = torch.nan, torch.nan, 0.0
    got = backward(scale, case.features, case.weight, None, case.target, lse, p_rest, None, tile=POINTER)
    assert all(g is None or g.isfinite().all() for g in got)
    assert (got[0][3] == 0).all()


@pytest.mark.parametrize("rows", [None, [3, 1, 7, 3]])
def test_the_operator_on_cuda_implementations(rows):
    case = cases.make(21, 16, 90, option="everything", bias=True)
    chosen = None if rows is None else torch.tensor(rows)
    options = (case.options["class_weight"], chosen, -100, 0.2, 7.0)
    *stats, p_rest, logits, left_out = operator._cuda.forward(
        *operator._pack(case.features, case.weight, case.bias, case.target, *options, False, 0.0)
    )
    grad = torch.rand(21)
    needs = (True, True, True)
    got = operator._cuda.backward(
        *operator._torch.pack_backward(
            grad,
            case.features,
            case.weight,
            case.bias,
            case.target,
            stats[1],
            p_rest,
            stats[5],
            logits,
            left_out,
            *options,
            *needs,
        )
    )
    wide = case.to(torch.float64)
    mask = torch.zeros(21).index_fill_(0, torch.arange(21) if chosen is None else chosen, 1.0)
    _, exact, spec = inputs(wide, grad * mask * stats[5])
    assert torch.allclose(p_rest.double(), exact, rtol=1e-5, atol=1e-7)
    for a, b in zip(got, spec, strict=True):
        assert float((a.double() - b).abs().max() / b.abs().max()) < 1e-5
