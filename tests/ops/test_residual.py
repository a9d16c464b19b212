"""The residual against the reference in float64 and against autograd."""

import pytest
import torch
from support.loss_cases import (
    DTYPES,
    OPTIONS,
    SHAPES,
    assert_error,
    compute_dtype,
    confident,
    double,
    problem,
)

from selbp import ops, reference


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, options):
    options = dict(options)
    weighted = options.pop("weighted")
    for n, n_classes, d in SHAPES:
        logits, target, _, class_weight = problem(n, n_classes, d, dtype, weighted)
        compute = compute_dtype(dtype)
        weight = None if class_weight is None else class_weight.to(compute)
        lse = reference.cross_entropy_statistics(logits.to(compute), target, **options).lse
        ours = ops.residual(logits, target, lse, class_weight=class_weight, **options)
        eager = reference.residual(logits.to(compute), target, lse, class_weight=weight, **options)
        exact = reference.residual(logits.double(), target, lse.double(), class_weight=double(class_weight), **options)
        assert ours.dtype == compute
        assert_error("residual", ours, eager, exact, torch.finfo(compute).eps, float(lse.abs().max()))


def test_is_the_gradient():
    logits, target, _, class_weight = problem(9, 12, 3, torch.float64, True)
    logits.requires_grad_()
    capped = 4.0 * torch.tanh(logits / 4.0)
    loss = torch.nn.functional.cross_entropy(capped, target, class_weight, reduction="none", label_smoothing=0.2)
    (expected,) = torch.autograd.grad(loss.sum(), logits)
    options = dict(class_weight=class_weight, label_smoothing=0.2, softcap=4.0)
    stats = ops.cross_entropy_statistics(logits, target, **options)
    ours = ops.residual(logits, target, stats.lse, **options)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(stats.residual_sq, expected.square().sum(1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confident_rows_keep_their_relative_accuracy(dtype):
    logits, target, exact = confident(dtype)
    ours = ops.residual(logits, target, ops.cross_entropy_statistics(logits, target).lse)
    q = -ours.gather(1, target[:, None])[:, 0].double()
    expected = -torch.expm1(-exact.loss)
    assert float(((q - expected) / expected).abs().max()) < 1e-4
    torch.testing.assert_close(ours.sum(1), torch.zeros(len(target), dtype=dtype), rtol=0, atol=1e-7)


def test_rows_without_a_gradient_are_zero():
    logits, target, _, _ = problem(8, 20, 4, torch.float32, False)
    target[:] = torch.arange(8)
    target[3] = -100
    logits[0, 5], logits[1, 1], logits[2, 7], logits[4, 9] = torch.nan, -torch.inf, torch.inf, -torch.inf
    for smoothing, zero in ((0.0, [0, 1, 2, 3]), (0.1, [0, 1, 2, 3, 4])):
        stats = ops.cross_entropy_statistics(logits, target, label_smoothing=smoothing)
        ours = ops.residual(logits, target, stats.lse, label_smoothing=smoothing)
        assert torch.isfinite(ours).all()
        assert (ours == 0).all(1).nonzero()[:, 0].tolist() == zero
        exact = reference.residual(logits.double(), target, stats.lse.double(), label_smoothing=smoothing)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_compiles_without_a_graph_break():
    logits, target, features, _ = problem(9, 5, 4, torch.float32, False)
    head = torch.randn(5, 4, requires_grad=True)

    def both(logits, target, features, head):
        stats = ops.cross_entropy_statistics(logits, target, features, label_smoothing=0.1)
        linear = ops.linear_cross_entropy_statistics(features, head, None, target)
        return stats.gradient_norm, linear.loss, ops.residual(logits, target, stats.lse)

    logits.requires_grad_()
    expected = both(logits, target, features, head)
    ours = torch.compile(both, fullgraph=True)(logits, target, features, head)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        logits, target = torch.empty(6, 5, dtype=torch.bfloat16), torch.empty(6, dtype=torch.int64)
        stats = ops.cross_entropy_statistics(logits, target)
        assert stats.loss.dtype == torch.float32 and stats.valid.dtype == torch.bool and stats.loss.shape == (6,)
        assert ops.residual(logits, target, stats.lse).shape == (6, 5)
        with pytest.raises(ValueError, match="target must be"):
            ops.cross_entropy_statistics(logits, target[:3])
