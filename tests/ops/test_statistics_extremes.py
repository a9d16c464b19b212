"""The statistics of rows that are confident, masked, ignored, infinite or near the optimum of label smoothing."""

import pytest
import torch
from support.loss_cases import assert_statistics, confident, problem

from selbp import ops, reference
from selbp.ops import _logit_pass


def check_confident(operator, dtype):
    logits, target, exact = confident(dtype)
    ours = operator(logits, target)
    for name in ("loss", "residual_sq"):
        a, x = getattr(ours, name).double(), getattr(exact, name)
        assert float(((a - x) / x).abs().max()) < 1e-4, name


def check_ignored_rows(operator):
    logits, target, features, _ = problem(33, 10, 5, torch.float32, False)
    target[7::5] = -100
    exact = reference.cross_entropy_statistics(logits.double(), target, features.double())
    ours = operator(logits, target, features)
    assert torch.equal(ours.valid, target != -100)
    assert torch.equal(ours.loss == 0, exact.loss == 0) and torch.equal(ours.residual_sq == 0, exact.residual_sq == 0)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confident_rows_keep_their_relative_accuracy(dtype):
    check_confident(ops.cross_entropy_statistics, dtype)
    logits, target, _ = confident(torch.float32)
    eager = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert (eager[:10] == 0).all()  # what torch says of the same rows


def cancelling(logits, target, features=None, **options):
    """A planted bug: the textbook forms of loss and norm, in the logits' dtype."""
    probs = logits.softmax(1)
    p_y = probs.gather(1, target.clamp(min=0)[:, None])[:, 0]
    ours = ops.cross_entropy_statistics(logits, target, features, **options)
    return ours._replace(residual_sq=probs.square().sum(1) - 2 * p_y + 1)


def wrong_row_mask(logits, target, features=None, **options):
    """A planted bug: the mask of the ignored rows is off by one row."""
    present = (target != -100).roll(1)
    ours = ops.cross_entropy_statistics(logits, target.clamp(min=0), features, **options)
    zero = torch.zeros(())
    return ours._replace(
        loss=torch.where(present, ours.loss, zero),
        residual_sq=torch.where(present, ours.residual_sq, zero),
        valid=present,
    )


def test_planted_bugs_are_caught():
    with pytest.raises(AssertionError, match="residual_sq"):
        check_confident(cancelling, torch.float32)
    check_ignored_rows(ops.cross_entropy_statistics)
    with pytest.raises(AssertionError):
        check_ignored_rows(wrong_row_mask)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("n_classes", [3, 16, 40])
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_flagged_and_spoil_no_other(spoil, n_classes, smoothing):
    logits, target, features, _ = problem(8, n_classes, 4, torch.float32, False)
    target[:] = torch.arange(8) % n_classes
    clean = ops.cross_entropy_statistics(logits, target, features, label_smoothing=smoothing)
    logits[2, target[2]] = spoil
    logits[5, (target[5] + 1) % n_classes] = spoil
    logits[7] = spoil
    features[0, 1] = abs(spoil)
    ours = ops.cross_entropy_statistics(logits, target, features, label_smoothing=smoothing)
    masked = spoil == -float("inf") and smoothing == 0  # a masked class that the loss does not weigh is legal
    assert ours.valid.tolist() == [False, True, False, True, True, masked, True, False][:8]
    assert not ours.correct[~ours.valid].any()
    for name in ("loss", "residual_sq", "feature_sq"):
        assert torch.equal(getattr(ours, name)[[1, 3, 4, 6]], getattr(clean, name)[[1, 3, 4, 6]])
    exact = reference.cross_entropy_statistics(logits.double(), target, features.double(), label_smoothing=smoothing)
    assert torch.equal(ours.valid, exact.valid)


def test_masked_classes_of_weight_zero_are_legal():
    logits, target, _, _ = problem(6, 20, 4, torch.float32, False)
    target[:] = torch.arange(6)
    weight = torch.ones(20)
    logits[:, 12:], weight[12:] = -torch.inf, 0.0
    options = {"class_weight": weight, "label_smoothing": 0.1}
    ours = ops.cross_entropy_statistics(logits, target, **options)
    eager = reference.cross_entropy_statistics(logits, target, **options)
    exact = reference.cross_entropy_statistics(
        logits.double(), target, class_weight=weight.double(), label_smoothing=0.1
    )
    assert_statistics(ours, eager, exact)
    assert ours.valid.all()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1e-5, 1e-3])
def test_norms_near_the_optimum_of_label_smoothing(noise, weighted, tiled, monkeypatch):
    """There r vanishes in every class; its norm must be off by a rounding of the target, not of the target's square."""
    n, n_classes, smoothing = 6, 5000, 0.1
    target, class_weight = torch.arange(n) * 7, torch.rand(n_classes) + 0.5 if weighted else None
    soft = reference.soft_target(target, n_classes, class_weight, smoothing, torch.float64)
    logits = (soft.log() + 3.0 + noise * torch.randn(n, n_classes)).float()
    options = {"class_weight": class_weight, "label_smoothing": smoothing}
    if tiled:
        monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 4096)
        ours = ops.linear_cross_entropy_statistics(torch.eye(n), logits.t().contiguous(), None, target, **options)
    else:
        ours = ops.cross_entropy_statistics(logits, target, **options)
    exact = reference.cross_entropy_statistics(logits.double(), target, **options).residual_sq
    rounding = 8 * 2.0**-23 * soft.norm(dim=1)
    allowed = (exact.sqrt() + rounding) ** 2 - exact
    assert ((ours.residual_sq.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_logit_of_infinity_leaves_no_loss(smoothing):
    """As in torch, and the same in the specification and here, wherever it stands."""
    logits = torch.zeros(3, 4)
    logits[0, 1] = logits[1, 2] = logits[2, 1] = logits[2, 3] = torch.inf
    target = torch.ones(3, dtype=torch.int64)
    assert torch.nn.functional.cross_entropy(logits, target, reduction="none").isnan().all()
    for compute in (ops.cross_entropy_statistics, reference.cross_entropy_statistics):
        got = compute(logits, target, label_smoothing=smoothing)
        assert got.loss.isnan().all() and got.residual_sq.isnan().all() and not got.valid.any()
