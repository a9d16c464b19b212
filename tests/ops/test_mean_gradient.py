from importlib import import_module

import pytest
import torch
from support.factors import DTYPES, draw, output_dtype, unit, with_bias

from selbp import ops, reference
from selbp.ops import _gemm

MODULE = import_module("selbp.ops.mean_gradient")
SHAPES = [(0, 3, 4), (1, 1, 1), (2, 1, 5), (5, 7, 1), (64, 10, 12), (129, 33, 65), (300, 100, 40), (40, 700, 90)]


def check_mean(mean_gradient, residual, features, bias):
    """Every field meets the rounding bound of its accumulation."""
    inner, target_sq, head_weight, head_bias = mean_gradient(residual, features, bias=bias)
    n, d, eps = len(residual), features.shape[1], unit(residual.dtype)
    r, h = residual.double(), with_bias(features, bias)
    exact, size = r.t() @ h / max(n, 1), r.abs().t() @ h.abs() / max(n, 1)
    error = (n + 2) * eps * size  # of M: a sum over n and a division
    for got in (inner, target_sq, head_weight, *([head_bias] if bias else [])):
        assert got.dtype == output_dtype(residual.dtype) and not got.requires_grad
    assert (head_bias is None) == (not bias)
    got = torch.cat([head_weight, head_bias[:, None]], 1) if bias else head_weight
    assert ((got.double() - exact).abs() <= error).all()
    steps = n + r.shape[1] + h.shape[1] + 6
    assert (
        (inner.double() - ((r @ exact) * h).sum(1)).abs() <= steps * eps * ((r.abs() @ size) * h.abs()).sum(1)
    ).all()
    slack = (2 * exact.abs() * error + error.square()).sum() + 2 * eps * exact.square().sum()
    assert (target_sq.double() - exact.square().sum()).abs() <= slack
    assert head_weight.shape == (r.shape[1], d) and inner.shape == (n,) and target_sq.shape == ()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, dtype, bias, device):
    residual, features = (x.to(device) for x in draw(*shape, dtype))
    check_mean(ops.mean_gradient, residual, features, bias)


@pytest.mark.parametrize("path", ["mm", "onednn", "native"])
def test_every_path(monkeypatch, path):
    if path == "onednn" and not _gemm._agree(torch.float32):
        pytest.skip("this torch has no mkldnn::_linear_pointwise for float32")
    monkeypatch.setattr(_gemm, "_choice", {torch.float32: path == "onednn"})
    monkeypatch.setattr(MODULE, "_stays_cached", lambda *_: path == "native")
    check_mean(ops.mean_gradient, *draw(501, 120, 130), True)


@pytest.mark.parametrize("shape", [(501, 120, 130), (6, 3, 700), (2, 40, 17)], ids=str)
def test_threads_change_no_bit(monkeypatch, shape):
    factors, found = draw(*shape), []
    for threads in (1, 3):
        monkeypatch.setattr(MODULE, "native_threads", lambda *_, threads=threads: threads)
        found.append(ops.mean_gradient(*factors))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_is_what_backward_leaves_in_the_head():
    head = torch.nn.Linear(12, 7).double()
    features, target = torch.randn(30, 12).double(), torch.randint(7, (30,))
    logits = head(features)
    torch.nn.functional.cross_entropy(logits, target).backward()
    residual = logits.detach().softmax(1) - torch.nn.functional.one_hot(target, 7)
    mean = ops.mean_gradient(residual, features)
    torch.testing.assert_close(mean.head_weight, head.weight.grad)
    torch.testing.assert_close(mean.head_bias, head.bias.grad)


def test_survives_a_mean_that_nearly_cancels():
    """Gradients in opposite pairs: 1' K 1 / n^2 is rounding noise where the factors still have digits."""
    residual, features = draw(128, 10, 16)
    residual = torch.cat([residual, -residual])
    features = torch.cat([features, features * (1 + 2.0**-16)])
    exact = reference.mean_gradient(residual.double(), features.double())
    ours = ops.mean_gradient(residual, features)
    from_gram = ops.gradient_gram(residual, features).double().sum() / len(residual) ** 2
    assert abs(from_gram / exact.target_sq - 1) > 0.5
    assert abs(ours.target_sq / exact.target_sq - 1) < 0.02
    assert (ours.inner - exact.inner).abs().max() < 0.02 * exact.inner.abs().max()


@pytest.mark.parametrize("scales", [(1e15, 1.0), (1e-15, 1.0), (1e15, 1e-15), (1e-15, 1e15)], ids=str)
def test_scales(scales):
    residual, features = draw(140, 10, 20)
    check_mean(ops.mean_gradient, residual * scales[0], features * scales[1], False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_a_row_that_is_not_finite_counts_as_zero(value, which, bias):
    factors = list(draw(50, 10, 12))
    factors[which][7, 3] = value
    factors[1 - which][7] = 0  # 0 * inf must not go unseen
    got = ops.mean_gradient(*factors, bias=bias)
    wanted = reference.mean_gradient(*(x.double() for x in factors), bias=bias)
    assert got.inner[7] == 0
    for a, b in zip(got, wanted, strict=True):
        assert (a is None and b is None) or torch.allclose(a.double(), b, rtol=1e-4, atol=1e-6)
