"""Times of the operators on a GPU beside eager torch and the peers, at the roofline's shapes: ``make gpu-check``.

Unmeasured: nobody has run it on a GPU yet. The tests run it on a CPU at a small shape, so that it does run.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bench_linear_cross_entropy, roofline_gpu
from benchmarks.harness import Unavailable
from benchmarks.peers import heads
from selbp import ops, reference


def milliseconds(work: Callable[[], object], device: str, repeats: int = 15) -> float:
    """Median over runs with a cold L2; on a CPU, which only tests ask for, one run."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    samples = []
    for index in range(repeats + 3):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if index >= 3:
            samples.append(begin.elapsed_time(end))
    return statistics.median(samples)


def peers() -> dict[str, Callable[..., Tensor]]:
    """Losses of features, weight and target, per token where the peer offers that; those that can run here."""
    found = {"eager": heads.eager, "Liger": heads.liger(), "Cut Cross-Entropy": heads.cut_cross_entropy()}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = F.linear_cross_entropy
    for name, loss in found.items():
        if isinstance(loss, Unavailable):
            print(f"     {name} is not measured: {loss.reason}")
    return {name: loss for name, loss in found.items() if not isinstance(loss, Unavailable)}


def measure(work: roofline_gpu.Work, device: str, ours: Callable[[], object], **others: Callable[[], object]) -> None:
    """Print the time of ``ours`` beside its model, and of each other one."""
    took, model = milliseconds(ours, device), roofline_gpu.modelled(work, roofline_gpu.DEVICES["H100"])
    print(
        f"     {work.kernel} {work.shape}: {took:.3f} ms, {work.flops / took / 1e9:.0f} TFLOP/s "
        f"(model, H100: {1e3 * model:.3f})",
        flush=True,
    )
    for name, other in others.items():
        try:
            theirs = milliseconds(other, device)
            print(f"     {name} {work.shape}: {theirs:.3f} ms, {theirs / took:.2f} of ours", flush=True)
        except (RuntimeError, TypeError, ValueError) as reason:
            print(f"     {name} {work.shape}: cannot run here: {str(reason)[:120]}", flush=True)


def peaked(n: int, n_classes: int, d: int, device: str) -> None:
    """The backward alone on a head like a trained language model's, exact and with ``skip_mass``."""
    h, w, y, upstream = bench_linear_cross_entropy._peaked(n, d, n_classes, n, torch.bfloat16, torch.device(device))

    def backward(loss: Tensor) -> object:
        return torch.autograd.grad(loss, (h, w), upstream.to(loss.dtype), retain_graph=True)

    for skip_mass in (0.0, *bench_linear_cross_entropy.SKIPS, 0.5):
        # What the forward of the operator left out is its last output.
        outputs = torch.ops.selbp.linear_cross_entropy(h, w, None, y, None, None, -100, 0.0, 0.0, False, skip_mass)
        formed = float((outputs[8] < 0).double().mean()) if outputs[8].numel() else None
        work = roofline_gpu.backward(n, n_classes, d, formed=formed)
        measure(work, device, functools.partial(backward, outputs[0]))


def throughput(shapes: list[tuple[int, int, int]], device: str = "cuda") -> None:
    """Every operator at the roofline's shapes (n, C, d) in bfloat16, beside eager torch and the peers."""
    for n, n_classes, d in shapes:
        h = torch.randn(n, d, device=device, dtype=torch.bfloat16).requires_grad_()
        w = (torch.randn(n_classes, d, device=device, dtype=torch.bfloat16) / d**0.5).requires_grad_()
        y = torch.randint(n_classes, (n,), device=device)
        losses, head = peers(), (h, w, y)

        def step(loss: Callable[..., Tensor], head: tuple[Tensor, ...] = head) -> object:
            return torch.autograd.grad(loss(*head).sum(), head[:2])

        with torch.no_grad():
            measure(
                roofline_gpu.statistics(n, n_classes, d),
                device,
                lambda: ops.linear_cross_entropy_statistics(h, w, None, y),  # noqa: B023
                **{name: functools.partial(loss, *head) for name, loss in losses.items()},
            )
            left, right = ops.sketch_projections(n_classes, d, dtype=h.dtype, device=device)
            tokens = h.view(n // 8, 8, d), w, None, y.view(n // 8, 8)
            measure(
                roofline_gpu.sketch(n, n_classes, d),
                device,
                functools.partial(ops.sketch, *tokens, (left, right)),
                eager=functools.partial(reference.sketch, *tokens, left, right),
            )
        measure(
            roofline_gpu.training(n, n_classes, d),
            device,
            functools.partial(step, lambda h, w, y: ops.linear_cross_entropy(h, w, None, y)),
            **{name: functools.partial(step, loss) for name, loss in losses.items()},
        )
        peaked(n, n_classes, d, device)
    n, n_classes, d = shapes[0]
    r, h = (torch.randn(n, k, device=device, dtype=torch.bfloat16) for k in (n_classes, d))
    measure(
        roofline_gpu.gram(n, n_classes, d),
        device,
        lambda: ops.gradient_gram(r, h),
        eager=lambda: (r @ r.T).float() * ((h @ h.T).float() + 1.0),
    )
    n, n_classes, _ = shapes[-1]
    z, y = torch.randn(n, n_classes, device=device, dtype=torch.bfloat16), torch.randint(n_classes, (n,), device=device)
    measure(
        roofline_gpu.logits_statistics(n, n_classes),
        device,
        lambda: ops.cross_entropy_statistics(z, y),
        eager=lambda: F.cross_entropy(z.float(), y, reduction="none"),
    )
    lse = torch.logsumexp(z.float(), 1)
    measure(
        roofline_gpu.residual(n, n_classes),
        device,
        lambda: ops.residual(z, y, lse),
        eager=lambda: torch.softmax(z.float(), 1).scatter_add_(1, y[:, None], -torch.ones_like(lse[:, None])),
    )
