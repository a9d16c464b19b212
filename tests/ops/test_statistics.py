"""The per-sample statistics of stored logits against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.loss_cases import DTYPES, OPTIONS, SHAPES, assert_statistics, compute_dtype, problem

from selbp import ops, reference


def compare(operator, logits, target, features, class_weight, **options):
    compute = compute_dtype(logits.dtype)
    wide, fine = (
        reference.cross_entropy_statistics(
            logits.to(dtype),
            target,
            None if features is None else features.to(dtype),
            class_weight=None if class_weight is None else class_weight.to(dtype),
            **options,
        )
        for dtype in (compute, torch.float64)
    )
    ours = operator(logits, target, features, class_weight=class_weight, **options)
    assert ours.loss.dtype == compute
    assert_statistics(ours, wide, fine)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, options):
    for n, n_classes, d in SHAPES:
        options = dict(options)
        weighted = options.pop("weighted", False)
        logits, target, features, class_weight = problem(n, n_classes, d, dtype, weighted)
        compare(ops.cross_entropy_statistics, logits, target, features, class_weight, **options)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 20),
    n_classes=st.integers(1, 80),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([0.0, 20.0]),
    weighted=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(n, n_classes, scale, smoothing, softcap, weighted, seed):
    torch.manual_seed(seed)
    logits, target, features, class_weight = problem(n, n_classes, 3, torch.float64, weighted, scale)
    ours = ops.cross_entropy_statistics(
        logits, target, features, class_weight=class_weight, label_smoothing=smoothing, softcap=softcap
    )
    exact = reference.cross_entropy_statistics(
        logits, target, features, class_weight=class_weight, label_smoothing=smoothing, softcap=softcap
    )
    for name in ("loss", "lse", "residual_sq", "feature_sq"):
        a, x = getattr(ours, name), getattr(exact, name)
        torch.testing.assert_close(a, x, rtol=1e-9, atol=1e-12)
    assert torch.equal(ours.valid, exact.valid) and torch.equal(ours.correct, exact.correct)


def test_losses_are_torchs():
    logits, target, _, weight = problem(64, 17, 5, torch.float64, True)
    for options in ({}, {"label_smoothing": 0.2}):
        eager = torch.nn.functional.cross_entropy(logits, target, weight, reduction="none", **options)
        ours = ops.cross_entropy_statistics(logits, target, class_weight=weight, **options).loss
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)


def test_bfloat16_losses_are_not_rounded_to_bfloat16():
    logits, target, _, _ = problem(64, 100, 4, torch.bfloat16, False)
    ours = ops.cross_entropy_statistics(logits, target)
    assert ours.loss.dtype == torch.float32
    exact = reference.cross_entropy_statistics(logits.double(), target)
    assert float((ours.loss - exact.loss).abs().max()) < 1e-5


def test_no_rows_and_no_features():
    empty = ops.cross_entropy_statistics(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.empty(0, 2))
    assert all(field.shape == (0,) for field in empty)
    ours = ops.cross_entropy_statistics(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert (ours.feature_sq == 1).all()
    no_width = ops.cross_entropy_statistics(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), torch.empty(4, 0))
    assert (no_width.feature_sq == 1).all()  # the bias's


def test_gradient_norm_is_that_of_autograd():
    logits, target, features, class_weight = problem(6, 5, 4, torch.float64, True)
    head = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    ours = ops.linear_cross_entropy_statistics(
        features, head, bias, target, class_weight=class_weight, label_smoothing=0.1, softcap=3.0
    )
    z = 3.0 * torch.tanh((features @ head.t() + bias) / 3.0)
    for i in range(6):
        loss = torch.nn.functional.cross_entropy(z[i], target[i], class_weight, label_smoothing=0.1, reduction="none")
        grads = torch.autograd.grad(loss, (head, bias), retain_graph=True)
        norm = sum(g.square().sum() for g in grads).sqrt()
        torch.testing.assert_close(ours.gradient_norm[i], norm, rtol=1e-10, atol=1e-12)


def test_nothing_is_recorded():
    logits, target, features, _ = problem(8, 5, 4, torch.float32, False)
    head = torch.randn(5, 4, requires_grad=True)
    for ours in (
        ops.cross_entropy_statistics(logits.requires_grad_(), target, features.requires_grad_()),
        ops.linear_cross_entropy_statistics(features, head, None, target),
    ):
        assert not any(field.requires_grad for field in ours)
