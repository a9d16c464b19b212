"""The fused head and loss, forward and backward, against the bare GEMMs that it needs and against eager torch.

``python -m benchmarks linear_cross_entropy`` times; ``python -m benchmarks.bench_linear_cross_entropy`` prints the
peak extra memory, returned gradients excluded on all sides, and with ``skip`` what ``skip_mass`` leaves out: the tiles,
the gradients' error relative to their norm, that error as a part of its bound, and the time. ``skip FILE`` does so for
a head of your own: ``torch.save((features, weight, target), FILE)``, of shapes (n, d), (C, d) and (n,).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, Unavailable, suite
from benchmarks.peers import heads
from benchmarks.tools.timing import interleaved
from selbp import ops
from selbp.ops import _gemm
from selbp_study.memory import peak_extra_bytes, printed_by

_TILE = 512  # classes
SKIPS = (0.02, 0.1)


def _head(
    n: int, d: int, classes: int, keep: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, d, device=device) / d**0.5).to(dtype).requires_grad_()
    upstream = torch.zeros(n, device=device).index_fill_(0, torch.randperm(n, device=device)[:keep], 1.0 / keep)
    return features, weight, torch.randint(classes, (n,), device=device), upstream


def _peaked(
    n: int, d: int, classes: int, keep: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head like a trained language model's: classes of Zipf's frequencies, logits of spread 4, targets drawn so.

    Of 50257 classes: the mean loss is about 3.5, and a row finds about 200 of them likelier than 2^-12.
    """
    features, weight, _, upstream = _head(n, d, classes, keep, torch.float32, device)
    with torch.no_grad():
        weight *= 4
        features[:, 0], weight[:, 0] = 1, -1.05 * torch.log(torch.arange(classes, device=device) + 2.7)
        rows = features.split(128)
        target = torch.cat([torch.softmax(h @ weight.t(), 1).multinomial(1)[:, 0] for h in rows])
    features, weight = (x.detach().to(dtype).requires_grad_() for x in (features, weight))
    return features, weight, target, upstream


def _ours(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    loss = ops.linear_cross_entropy(features, weight, None, target)
    return torch.autograd.grad(loss, (features, weight), upstream)


def _least_memory(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Ours with no logits kept."""
    loss = ops.linear_cross_entropy(features, weight, None, target, memory_limit=0)
    return torch.autograd.grad(loss, (features, weight), upstream)


def _skipping(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    upstream: Tensor,
    skip_mass: float,
    memory_limit: int | None = None,
) -> tuple[Tensor, ...]:
    """Ours, tiles of little probability left out."""
    loss = ops.linear_cross_entropy(features, weight, None, target, skip_mass=skip_mass, memory_limit=memory_limit)
    return torch.autograd.grad(loss, (features, weight), upstream)


def _eager(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """``F.cross_entropy(F.linear(...))``."""
    logits = torch.nn.functional.linear(features, weight)
    loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    return torch.autograd.grad(loss, (features, weight), upstream.to(loss.dtype))


def _torch_chunked(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    """Torch's own fused head, rows in chunks; it has a mean only, so every row counts."""
    options = torch.nn.LinearCrossEntropyOptions()
    loss = torch.nn.functional.linear_cross_entropy(features, weight, target, options=options)
    return torch.autograd.grad(loss, (features, weight))


def _bare(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> None:
    """Nothing but the fastest GEMMs: logits of n rows, kept; both gradients of the k rows; the gradient stored.

    A tile of 512 classes at a time: for torch's oneDNN this is faster than whole matrices and than larger tiles.
    """
    h, w = features.detach(), weight.detach()
    product = _gemm.linear if h.device.type == "cpu" else torch.nn.functional.linear
    rows = upstream.nonzero()[:, 0]
    chosen, gradient = h[rows], torch.empty_like(w)
    tiles = [product(h, w[c : c + _TILE]) for c in range(0, len(w), _TILE)]
    for c, logits in zip(range(0, len(w), _TILE), tiles, strict=True):
        part, tile = w[c : c + _TILE], logits if len(rows) == len(h) else logits[rows]
        gradient[c : c + _TILE] = product(tile.t(), chosen.t())
        product(tile, part.t())


def _bare_whole(features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> None:
    """The same products of whole matrices."""
    h, w = features.detach(), weight.detach()
    product = _gemm.linear if h.device.type == "cpu" else torch.nn.functional.linear
    rows = upstream.nonzero()[:, 0]
    chosen, logits = h[rows], product(h, w)[rows]
    product(logits.t(), chosen.t())
    product(logits, w.t())


def _torch_own(n: int, keep: int) -> Callable[..., object] | Unavailable:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return Unavailable(f"torch {torch.__version__} has no linear_cross_entropy in chunks")
    return _torch_chunked if keep == n else Unavailable("it has no gradient of chosen rows")


def _case(
    n: int,
    d: int,
    classes: int,
    keep: int,
    dtype: torch.dtype = torch.float32,
    quick: bool = False,
    head: Callable[..., tuple[Tensor, ...]] = _head,
) -> Case:
    return Case(
        f"linear cross-entropy n={n} d={d} C={classes} k={keep} {str(dtype).removeprefix('torch.')}"
        f"{' peaked' if head is _peaked else ''}",
        partial(head, n, d, classes, keep, dtype),
        {
            "ours": _ours,
            "ours: memory_limit=0": _least_memory,
            **{f"ours: skip_mass={x}": partial(_skipping, skip_mass=x) for x in SKIPS if head is _peaked or quick},
            "its GEMMs alone, in tiles": _bare,
            "its GEMMs alone, whole": _bare_whole,
            "eager": _eager,
            "F.linear_cross_entropy, chunked": _torch_own(n, keep),
        },
        flops=2 * (n + 2 * keep) * d * classes,
        nbytes=dtype.itemsize * 4 * classes * d,
        formula="2 (n + 2 k) d C flops; the weight read three times and its gradient written",
        dtype=dtype,
        limits={} if quick else {"its GEMMs alone, in tiles": 1.15, "eager": 1.0 if dtype == torch.float32 else 1.05},
        quick=quick,
        rounds=7 if quick else 3,
    )


CASES = [
    _case(128, 128, 1000, 32, quick=True),
    _case(1024, 1024, 50257, 1024),
    _case(1024, 1024, 50257, 256),
    _case(1024, 1024, 50257, 1024, torch.bfloat16),
    _case(1024, 1024, 50257, 1024, head=_peaked),
]
CASES = [replace(case, contenders={**case.contenders, **heads.others()}) for case in CASES]
test_linear_cross_entropy = suite(CASES)

_MEMORY = {"ours": _ours, "least": _least_memory, "eager": _eager}


def peak_mebibytes(name: str, n: int, d: int, classes: int, keep: int, threads: int = 2) -> float:
    """Peak memory of one forward and backward beyond its returned gradients, in a fresh process."""
    return float(printed_by("benchmarks.bench_linear_cross_entropy", name, n, d, classes, keep, threads))


def print_skipped(file: str | None = None) -> None:
    """Print what ``skip_mass`` leaves out of a peaked head and of one at its start, or of that in ``file``."""
    if file is None:
        draws = {"peaked": partial(_peaked, 512, 1024, 50257), "random": partial(_head, 512, 1024, 50257)}
    else:
        features, weight, target = torch.load(file)
        upstream = torch.full((len(features),), 1 / len(features), dtype=features.dtype)
        found = features.requires_grad_(), weight.requires_grad_(), target, upstream
        draws = {file: lambda *_: found}
    for name, draw in draws.items():
        torch.manual_seed(0)
        _print_skipped(name, *draw(512, torch.float32, torch.device("cpu")))


def _print_skipped(name: str, features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> None:
    (n, d), classes = features.shape, len(weight)
    head = features, weight, target, upstream
    exact = _ours(*head)
    calls = [partial(_least_memory, *head), *(partial(_skipping, *head, skip_mass=x, memory_limit=0) for x in SKIPS)]
    whole, *seconds = (ms / 1e3 for ms in interleaved(calls, 0.0))
    for skip_mass, took in zip(SKIPS, seconds, strict=True):
        table = torch.ops.selbp.linear_cross_entropy(
            features, weight, None, target, None, None, -100, 0.0, 0.0, False, skip_mass
        )
        errors = [a - b for a, b in zip(_skipping(*head, skip_mass), exact, strict=True)]
        e = 2 * skip_mass * upstream * table[6].detach()
        live = table[5]  # a row whose target is ignored leaves nothing out of nothing
        rows = (errors[0].norm(dim=1) / (e * weight.detach().norm(dim=1).max()))[live]
        classes_error = errors[1].norm(dim=1).sum() / (e * features.detach().norm(dim=1)).sum()
        left_out = float((table[8][live] >= 0).double().mean())
        relative = [float(x.norm() / y.norm()) for x, y in zip(errors, exact, strict=True)]
        print(
            f"{name} n={n} d={d} C={classes} skip_mass={skip_mass}: tiles left out {left_out:.1%}, "
            f"errors {relative[0]:.2%} (features) and {relative[1]:.2%} (weight), of their bounds "
            f"{float(rows.max()):.1%} and {float(classes_error):.1%}, {took:.2f} s for {whole:.2f} s"
        )


def main() -> None:
    """Print the table of memory or, with ``skip``, of what is left out; with more arguments, one entry of memory."""
    if sys.argv[1:2] == ["skip"]:
        torch.set_num_threads(1)
        print_skipped(*sys.argv[2:3])
        return
    if len(sys.argv) > 1:
        n, d, classes, keep, threads = map(int, sys.argv[2:])
        torch.set_num_threads(threads)
        head = _head(n, d, classes, keep, torch.float32, torch.device("cpu"))
        returned = sum(4 * tensor.numel() for tensor in head[:2])
        print((peak_extra_bytes(partial(_MEMORY[sys.argv[1]], *head)) - returned) / 2**20)
        return
    print("peak extra memory in MiB, forward and backward, returned gradients excluded, float32, 2 threads")
    for n, d, classes, keep in ((1024, 1024, 50257, 1024), (1024, 1024, 50257, 256)):
        ours, least, eager = (peak_mebibytes(name, n, d, classes, keep) for name in _MEMORY)
        print(
            f"n={n} d={d} C={classes} k={keep}: ours {ours:.1f}, with memory_limit=0 {least:.1f}, eager {eager:.1f}, "
            f"ratios {ours / eager:.3f} and {least / eager:.3f}"
        )


if __name__ == "__main__":
    main()
