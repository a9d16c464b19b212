"""The statistics by-product: a linear head's per-sample statistics against its bare GEMM and against eager torch.

``python -m benchmarks statistics`` times; ``python -m benchmarks.bench_statistics`` prints the peak extra memory.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, suite
from selbp import ops
from selbp.ops import _gemm
from selbp_study.memory import peak_extra_bytes, printed_by


def _head(
    n: int, d: int, classes: int, dtype: torch.dtype, bias: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    features = torch.randn(n, d, device=device).to(dtype)
    weight = (torch.randn(classes, d, device=device) / d**0.5).to(dtype)
    return (
        features,
        weight,
        torch.randn(classes, device=device).to(dtype) if bias else None,
        torch.randint(classes, (n,), device=device),
    )


def _logits(n: int, classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(n, classes, device=device), torch.randint(classes, (n,), device=device)


def _eager_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The fewest torch calls that give loss, squared residual norm and correctness."""
    log_probs = torch.log_softmax(logits.float(), 1)
    loss = torch.nn.functional.nll_loss(log_probs, target, reduction="none")
    residual = log_probs.exp_().scatter_add_(1, target[:, None], torch.full_like(loss[:, None], -1.0))
    return loss, residual.square_().sum(1), logits.argmax(1) == target


def _eager(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
    """Those, from the head, with the squared feature norm: four of our six outputs."""
    logits = torch.nn.functional.linear(features, weight, bias)
    return *_eager_rows(logits, target), features.float().square().sum(1) + float(bias is not None)


def _eager_all(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, ...]:
    """All six of our outputs: the log-sum-exp too, and which rows are finite and not ignored."""
    logits = torch.nn.functional.linear(features, weight, bias)
    loss, residual_sq, correct = _eager_rows(logits, target)
    feature_sq = features.float().square().sum(1) + float(bias is not None)
    lse = loss + logits.gather(1, target[:, None])[:, 0]
    valid = torch.isfinite(lse + residual_sq + feature_sq) & (target != -100)
    return loss, lse, residual_sq, feature_sq, correct & valid, valid


def _eager_chunks(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> list[tuple[Tensor, ...]]:
    """Eager torch, 64 rows at a time."""
    return [_eager(h, weight, bias, y) for h, y in zip(features.split(64), target.split(64), strict=True)]


def _bare(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The fastest GEMM that torch offers, alone."""
    return _gemm.linear(features, weight) if features.device.type == "cpu" else features @ weight.t()


def _case(
    n: int, d: int, classes: int, dtype: torch.dtype, limits: dict[str, float], bias: bool = False, quick: bool = False
) -> Case:
    size = dtype.itemsize
    return Case(
        f"statistics of a head n={n} d={d} C={classes} {str(dtype).removeprefix('torch.')}",
        partial(_head, n, d, classes, dtype, bias),
        {
            "ours": ops.linear_cross_entropy_statistics,
            "the fastest GEMM alone": _bare,
            "torch.mm alone": lambda h, w, b, y: torch.mm(h, w.t()),
            "eager torch, the same outputs": _eager_all,
            "eager torch, loss, norms and correct only": _eager,
            "eager torch, 64 rows at a time": _eager_chunks,
        },
        flops=2 * n * d * classes,
        nbytes=size * (n * d + classes * d),
        formula="2 n d C flops; features and weight read once",
        dtype=dtype,
        limits=limits,
        quick=quick,
        rounds=7 if quick else 3,
    )


CASES = [
    _case(128, 128, 10, torch.float32, {"eager torch, the same outputs": 0.5}, bias=True, quick=True),
    _case(256, 768, 32000, torch.float32, {"the fastest GEMM alone": 1.10}),
    _case(1024, 1024, 50257, torch.float32, {"the fastest GEMM alone": 1.10}),
    _case(256, 768, 32000, torch.bfloat16, {"the fastest GEMM alone": 1.25}),
    _case(1024, 1024, 50257, torch.bfloat16, {"the fastest GEMM alone": 1.25}),
    *(
        Case(
            f"statistics of logits n={n} C={classes}",
            partial(_logits, n, classes),
            {"ours": ops.cross_entropy_statistics, "eager torch": _eager_rows},
            nbytes=4 * n * classes,
            formula="n C logits read once",
            quick=n * classes < 100_000,
        )
        for n, classes in ((128, 10), (512, 100), (1024, 50257))
    ),
]
test_statistics = suite(CASES)


_MEMORY = {"ours": ops.linear_cross_entropy_statistics, "64 rows at a time": _eager_chunks, "eager": _eager}


def peak_mebibytes(name: str, n: int, d: int, classes: int, threads: int = 2) -> float:
    """Peak extra memory of one call of the contender ``name``, scratch of the GEMM included, in a fresh process."""
    return float(printed_by("benchmarks.bench_statistics", name, n, d, classes, threads))


def main() -> None:
    """Print the table of memory; with arguments, one entry of it."""
    if len(sys.argv) > 1:
        n, d, classes, threads = map(int, sys.argv[2:])
        torch.set_num_threads(threads)
        head = _head(n, d, classes, torch.float32, False, torch.device("cpu"))
        print(peak_extra_bytes(partial(_MEMORY[sys.argv[1]], *head)) / 2**20)
        return
    print("peak extra memory in MiB at n=1024, d=1024, float32, 2 threads: ours must not grow with C")
    print(f"{'C':>8}" + "".join(f"{name:>20}" for name in _MEMORY))
    for classes in (12_500, 50_257, 100_514):
        peaks = (peak_mebibytes(name, 1024, 1024, classes) for name in _MEMORY)
        print(f"{classes:>8}" + "".join(f"{peak:>20.1f}" for peak in peaks))


if __name__ == "__main__":
    main()
