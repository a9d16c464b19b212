"""What ``backward="auto"`` chooses beside the times of both strategies.

``python -m benchmarks.tools.rows_auto [plain] [share ...] [model ...]``: ``plain`` leaves the allocator as it is.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor
from torch.nn import functional as F

import selbp
from benchmarks.bench_rows import SHARES, forward_alone, full_step, on_rows, second_forward
from benchmarks.tools.timing import interleaved
from selbp_study.models import SmallCNN, Transformer
from selbp_study.row_models import TIMED, Task, classification


def _demo_images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 28, 28), torch.randint(10, (n,))


def _characters(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(63, (n, 32)), torch.randint(63, (n, 32))


def _per_text(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


STUDIED = {
    "demo": Task(lambda: SmallCNN((28, 28), 10), _demo_images, classification, 128),
    "text": Task(lambda: Transformer((32,), 63), _characters, _per_text, 64),
}


def table(words: list[str], seconds: float = 4.0) -> str:
    """Process-CPU milliseconds (20th percentile, interleaved) of both strategies, and which one auto takes.

    ``bound / rows`` is the share of the model's bound that is reached: a backward that costs f of all n rows'. The next
    column takes the kernels as they are, by the ordinary backward of a batch of k: what is missing there is ours.

    Args:
        words: ``plain`` leaves the allocator as it is; numbers are shares (0.25), the rest models (all).
        seconds: for each model and share.
    """
    torch.set_num_threads(1)
    kept = selbp.keep_freed_memory() if "plain" not in words else False
    lines = [
        f"freed memory is {'kept' if kept else 'returned (plain glibc)'}",
        "",
        "| model | keep | full | rows | recompute | bound / rows | with these kernels | rows / recompute "
        "| auto | auto / better |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    tasks = {**TIMED, **STUDIED}
    for name in [word for word in words if word in tasks] or list(tasks):
        task = tasks[name]
        torch.manual_seed(0)
        model = task.build()
        x, y = task.batch(task.n)
        for share in [float(word) for word in words if word[0] in "0."] or SHARES:
            chosen = torch.randperm(task.n)[: max(1, round(share * task.n))]
            few = (x[chosen], y[chosen])
            calls = [
                functools.partial(run, task, model, *batch, chosen)
                for run, batch in (
                    (full_step, (x, y)),
                    (forward_alone, (x, y)),
                    (on_rows, (x, y)),
                    (second_forward, (x, y)),
                    (full_step, few),
                    (forward_alone, few),
                )
            ]
            full, forward, rows, again, full_k, forward_k = interleaved(calls, seconds)
            picked = selbp.diagnose(model, (x, y), share, loss=task.losses).recommendation
            bound, reachable = forward + share * (full - forward), forward + full_k - forward_k
            best = (rows if picked == "rows" else again) / min(rows, again)
            lines.append(
                f"| {name} | {share} | {full:.1f} | {rows:.1f} | {again:.1f} | {bound / rows:.3f} "
                f"| {reachable / rows:.3f} | {rows / again:.3f} | {picked} | {best:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
