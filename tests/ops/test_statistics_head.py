"""The per-sample statistics of a head that stores no logits: tiles, and the native pass of a small head."""

import os
import subprocess
import sys

import pytest
import torch
from support.loss_cases import DTYPES, OPTIONS, assert_statistics, compute_dtype, confident, double

from selbp import ops, reference
from selbp.ops import _logit_pass
from selbp_study.memory import RETURN_FREED


def head_problem(n, d, n_classes, dtype, bias=True):
    features, target = torch.randn(n, d).to(dtype), torch.randint(n_classes, (n,))
    weight = (torch.randn(n_classes, d) * 2 / d**0.5).to(dtype)
    return features, weight, torch.randn(n_classes).to(dtype) if bias else None, target


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_form_matches_the_reference_over_tiles(dtype, options, monkeypatch):
    monkeypatch.setattr(_logit_pass, "_TILE_ROWS", 16)
    monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 16 * 64 * 4)
    options = dict(options)
    for n, d, n_classes, bias in ((1, 3, 1, True), (33, 20, 70, True), (16, 8, 64, False), (40, 33, 129, True)):
        features, weight, b, target = head_problem(n, d, n_classes, dtype, bias)
        target[0] = -100 if n > 1 else 0
        class_weight = torch.rand(n_classes).to(dtype) if options.get("weighted") else None
        rest = {name: options[name] for name in ("label_smoothing", "softcap")}
        ours = ops.linear_cross_entropy_statistics(features, weight, b, target, class_weight=class_weight, **rest)
        # The logits of a 16-bit linear layer are 16-bit in eager torch too: both then see the same rounded products.
        eager = reference.cross_entropy_statistics(
            torch.nn.functional.linear(features, weight, b).to(compute_dtype(dtype)),
            target,
            features.to(compute_dtype(dtype)),
            bias=bias,
            class_weight=None if class_weight is None else class_weight.to(compute_dtype(dtype)),
            **rest,
        )
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


def test_linear_form_keeps_confident_rows(monkeypatch):
    logits, target, exact = confident(torch.float32)
    identity = torch.eye(len(target))  # features that pick one row of the transposed logits each
    monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 4 * 64 * len(target))
    ours = ops.linear_cross_entropy_statistics(identity, logits.t(), None, target)
    assert float(((ours.loss.double() - exact.loss) / exact.loss).abs().max()) < 1e-4
    assert float(((ours.residual_sq.double() - exact.residual_sq) / exact.residual_sq).abs().max()) < 1e-4


PEAKS = """
import torch
from selbp import ops
from selbp_study.memory import peak_extra_bytes
torch.set_num_threads(2)
features, target = torch.randn(1024, 64), torch.zeros(1024, dtype=torch.int64)
for classes in (20_000, 80_000):
    weight = torch.randn(classes, 64)
    print(peak_extra_bytes(lambda: ops.linear_cross_entropy_statistics(features, weight, None, target)) / 2**20)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the kernel's mark of peak memory")
def test_memory_does_not_grow_with_the_classes():
    command = [sys.executable, "-c", PEAKS]
    said = subprocess.run(command, env={**os.environ, **RETURN_FREED}, check=True, capture_output=True, text=True)
    peaks = [float(line) for line in said.stdout.split()]
    assert max(peaks) < 16 and peaks[1] < peaks[0] + 4  # the logits alone are 78 and 312 MiB


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
    monkeypatch.setattr(_logit_pass._gemm, "linear", None)  # the native product alone
    ours = ops.linear_cross_entropy_statistics(features, weight, bias, target, class_weight=class_weight)
    strided = ops.linear_cross_entropy_statistics(
        features.t().contiguous().t(),
        torch.cat([weight, weight], 1)[:, : shape[2]],
        None if bias is None else torch.stack([bias, bias], 1)[:, 0],
        target,
        class_weight=class_weight,
    )
    for a, b in zip(strided, ours, strict=True):
        assert torch.equal(a, b)
    wide, fine = (
        reference.linear_cross_entropy_statistics(
            *(None if x is None else x.to(dtype) for x in (features, weight, bias)),
            target,
            class_weight=None if class_weight is None else class_weight.to(dtype),
        )
        for dtype in (torch.float32, torch.float64)
    )
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
