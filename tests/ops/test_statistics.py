"""The per-sample statistics against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import DTYPES, OPTIONS, SHAPES, assert_statistics, compute_dtype, confident, double, problem

from benchmarks.bench_statistics import peak_mebibytes
from selbp import ops, reference
from selbp.ops import statistics


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
    n=st.integers(0, 20), n_classes=st.integers(1, 80), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]), softcap=st.sampled_from([0.0, 20.0]), weighted=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
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
        loss=torch.where(present, ours.loss, zero), residual_sq=torch.where(present, ours.residual_sq, zero),
        valid=present,
    )  # fmt: skip


def test_planted_bugs_are_caught():
    with pytest.raises(AssertionError, match="residual_sq"):
        check_confident(cancelling, torch.float32)
    check_ignored_rows(ops.cross_entropy_statistics)
    with pytest.raises(AssertionError):
        check_ignored_rows(wrong_row_mask)


def test_losses_are_torchs():
    logits, target, _, weight = problem(64, 17, 5, torch.float64, True)
    for options in ({}, {"label_smoothing": 0.2}):
        eager = torch.nn.functional.cross_entropy(logits, target, weight, reduction="none", **options)
        ours = ops.cross_entropy_statistics(logits, target, class_weight=weight, **options).loss
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)


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
    compare(ops.cross_entropy_statistics, logits, target, None, weight, label_smoothing=0.1)
    assert ops.cross_entropy_statistics(logits, target, class_weight=weight, label_smoothing=0.1).valid.all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    logits, target, features, _ = problem(12, 37, 6, dtype, False)
    expected = ops.cross_entropy_statistics(logits, target, features)
    wide = torch.cat([logits, logits], 1)
    everything = [
        (logits.t().contiguous().t(), target, features.t().contiguous().t()),
        (wide[:, :37], torch.stack([target, target], 1)[:, 0], torch.cat([features, features], 1)[:, :6]),
    ]
    for arguments in everything:
        for a, b in zip(ops.cross_entropy_statistics(*arguments), expected, strict=True):
            assert torch.equal(a, b)
    row = ops.cross_entropy_statistics(logits[:1].expand(5, 37), target[:1].expand(5))
    assert (row.loss == expected.loss[0]).all()


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


def small_head(n, n_classes, d, with_bias):
    target = torch.randint(n_classes, (n,))
    target[1] = -100
    bias = torch.randn(n_classes) if with_bias else None
    return torch.randn(n, d), torch.randn(n_classes, d) / max(1, d) ** 0.5, bias, target


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(16, 1, 3), (128, 10, 128), (17, 16, 7), (39, 17, 65), (64, 70, 1), (20, 3, 0)])
def test_small_heads(shape, with_bias, weighted, monkeypatch):
    features, weight, bias, target = small_head(*shape, with_bias)
    class_weight = torch.rand(shape[1]) if weighted else None
    monkeypatch.setattr(statistics._gemm, "linear", None)  # the native product alone
    ours = ops.linear_cross_entropy_statistics(features, weight, bias, target, class_weight=class_weight)
    strided = ops.linear_cross_entropy_statistics(
        features.t().contiguous().t(), torch.cat([weight, weight], 1)[:, : shape[2]],
        None if bias is None else torch.stack([bias, bias], 1)[:, 0], target, class_weight=class_weight,
    )  # fmt: skip
    for a, b in zip(strided, ours, strict=True):
        assert torch.equal(a, b)
    wide, fine = (
        reference.linear_cross_entropy_statistics(
            *(None if x is None else x.to(dtype) for x in (features, weight, bias)), target,
            class_weight=None if class_weight is None else class_weight.to(dtype),
        )
        for dtype in (torch.float32, torch.float64)
    )  # fmt: skip
    assert_statistics(ours, wide, fine)


def test_small_heads_flag_rows_and_keep_confident_ones():
    features, weight, bias, target = small_head(40, 10, 12, True)
    target[target == 9] = 0
    bias[9] = -torch.inf
    features[3, 0], features[9, 2] = torch.nan, torch.inf
    ours = ops.linear_cross_entropy_statistics(features, weight, bias, target)
    assert (~ours.valid).nonzero()[:, 0].tolist() == [1, 3, 9]
    assert not ours.correct[~ours.valid].any()

    logits, target, exact = confident(torch.float32, n_classes=50)
    ours = ops.linear_cross_entropy_statistics(torch.eye(len(logits)), logits.t().contiguous(), None, target)
    for name in ("loss", "residual_sq"):
        a, x = getattr(ours, name).double(), getattr(exact, name)
        assert float(((a - x) / x).abs().max()) < 1e-4, name

    target[7] = 50
    with pytest.raises(ValueError, match=r"target must lie in \[0, 50\).* got 50 in row 7"):
        ops.linear_cross_entropy_statistics(torch.eye(len(logits)), logits.t(), None, target)


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


@pytest.mark.parametrize(
    "error,match,change",
    [
        (TypeError, "logits must be float32", {"logits": torch.zeros(4, 3, dtype=torch.int64)}),
        (ValueError, r"logits must be \(n, C\), got \(4,\)", {"logits": torch.zeros(4)}),
        (ValueError, "at least one class", {"logits": torch.zeros(4, 0)}),
        (TypeError, "target must be int64", {"target": torch.zeros(4, dtype=torch.int32)}),
        (ValueError, r"target must be \(n,\) with n = 4 as logits, got \(5,\)", {"target": torch.zeros(5).long()}),
        (ValueError, "features must be", {"features": torch.zeros(3, 2)}),
        (TypeError, "features must be a Tensor", {"features": [1.0]}),
        (ValueError, "class_weight must be", {"class_weight": torch.ones(2)}),
        (TypeError, "class_weight must be float32", {"class_weight": torch.ones(3).long()}),
        (ValueError, "label_smoothing must be", {"label_smoothing": 1.5}),
        (ValueError, "label_smoothing must be", {"label_smoothing": float("nan")}),
        (ValueError, "softcap must be", {"softcap": -1.0}),
        (TypeError, "ignore_index must be an int", {"ignore_index": 1.0}),
        (ValueError, r"target must lie in \[0, 3\).*got 3 in row 2", {"target": torch.tensor([0, 1, 3, 0])}),
        (ValueError, r"target must lie in \[0, 3\).*got -1 in row 1", {"target": torch.tensor([0, -1, 3, 0])}),
    ],
)
def test_errors_name_the_argument(error, match, change):
    arguments = {"logits": torch.zeros(4, 3), "target": torch.zeros(4, dtype=torch.int64), **change}
    with pytest.raises(error, match=match):
        ops.cross_entropy_statistics(**arguments)


# ------------------------------------------------------------------------------------------------ the linear form


def head_problem(n, d, n_classes, dtype, bias=True):
    features, target = torch.randn(n, d).to(dtype), torch.randint(n_classes, (n,))
    weight = (torch.randn(n_classes, d) * 2 / d**0.5).to(dtype)
    return features, weight, torch.randn(n_classes).to(dtype) if bias else None, target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_form_matches_the_reference_over_tiles(dtype, options, monkeypatch):
    monkeypatch.setattr(statistics, "_TILE_ROWS", 16)
    monkeypatch.setattr(statistics, "_TILE_BYTES", 16 * 64 * 4)
    options = dict(options)
    for n, d, n_classes, bias in ((1, 3, 1, True), (33, 20, 70, True), (16, 8, 64, False), (40, 33, 129, True)):
        features, weight, b, target = head_problem(n, d, n_classes, dtype, bias)
        target[0] = -100 if n > 1 else 0
        class_weight = torch.rand(n_classes).to(dtype) if options.get("weighted") else None
        rest = {name: options[name] for name in ("label_smoothing", "softcap")}
        ours = ops.linear_cross_entropy_statistics(features, weight, b, target, class_weight=class_weight, **rest)
        # The logits of a 16-bit linear layer are 16-bit in eager torch too: both then see the same rounded products.
        eager = reference.cross_entropy_statistics(
            torch.nn.functional.linear(features, weight, b).to(compute_dtype(dtype)), target,
            features.to(compute_dtype(dtype)), bias=bias,
            class_weight=None if class_weight is None else class_weight.to(compute_dtype(dtype)), **rest,
        )  # fmt: skip
        exact = reference.linear_cross_entropy_statistics(
            double(features), double(weight), double(b), target, class_weight=double(class_weight), **rest
        )
        if dtype in (torch.bfloat16, torch.float16):  # near-ties may order differently after rounding
            agree = ours.correct == exact.correct
            assert agree.float().mean() > 0.9
            exact = exact._replace(correct=ours.correct)
        assert_statistics(ours, eager, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_form_in_one_tile_equals_the_logits_form(dtype):
    features, weight, bias, target = head_problem(50, 12, 30, dtype)
    logits = torch.nn.functional.linear(features, weight, bias)
    ours = ops.linear_cross_entropy_statistics(features, weight, bias, target)
    theirs = ops.cross_entropy_statistics(logits, target, features)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_linear_form_takes_any_strides_and_no_rows():
    features, weight, bias, target = head_problem(10, 6, 40, torch.float32)
    expected = ops.linear_cross_entropy_statistics(features, weight, bias, target)
    ours = ops.linear_cross_entropy_statistics(
        features.t().contiguous().t(), weight.t().contiguous().t(), bias[:, None].expand(-1, 2)[:, 0], target
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert ops.linear_cross_entropy_statistics(features[:0], weight, bias, target[:0]).loss.shape == (0,)


def test_linear_form_keeps_confident_rows(monkeypatch):
    logits, target, exact = confident(torch.float32)
    identity = torch.eye(len(target))  # features that pick one row of the transposed logits each
    monkeypatch.setattr(statistics, "_TILE_BYTES", 4 * 64 * len(target))
    ours = ops.linear_cross_entropy_statistics(identity, logits.t(), None, target)
    assert float(((ours.loss.double() - exact.loss) / exact.loss).abs().max()) < 1e-4
    assert float(((ours.residual_sq.double() - exact.residual_sq) / exact.residual_sq).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "error,match,change",
    [
        (ValueError, r"weight must be \(C, d\) with d = 2 as features, got \(3, 5\)", {"weight": torch.zeros(3, 5)}),
        (TypeError, "weight must have the dtype of features", {"weight": torch.zeros(3, 2).double()}),
        (ValueError, "bias must be", {"bias": torch.zeros(4)}),
        (ValueError, "features must be", {"features": torch.zeros(4)}),
        (ValueError, "target must lie in", {"target": torch.tensor([0, 1, 2, 3])}),
    ],
)
def test_linear_form_errors(error, match, change):
    arguments = {
        "features": torch.zeros(4, 2), "weight": torch.zeros(3, 2), "bias": None,
        "target": torch.zeros(4, dtype=torch.int64), **change,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        ops.linear_cross_entropy_statistics(**arguments)


def test_memory_does_not_grow_with_the_classes():
    peaks = [peak_mebibytes("ours", 1024, 64, classes) for classes in (20_000, 80_000)]
    assert max(peaks) < 16 and peaks[1] < peaks[0] + 4  # the logits alone are 78 and 312 MiB


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
        monkeypatch.setattr(statistics, "_TILE_BYTES", 4096)
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
