"""What a compiled backward on chosen rows could reach at best.

``python -m benchmarks.tools.rows_compile [share] [model ...]`` prints it for the five models. A compiled region's
backward is traced for n rows. An upper bound on one that runs k rows is the compiled forward of n rows and the compiled
backward of a batch of k, both timed on an ordinary compiled model: ``compiled, at best``, without any copy. Beside it
stands the eager step on rows. Below 1 in the last column there is something to win.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import selbp
from benchmarks.bench_rows import finish, on_rows
from benchmarks.tools.timing import interleaved
from selbp_study.row_models import TIMED, Task


def _compiled(task: Task, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The per-sample losses of ``model``, as one compiled region for one size of batch."""
    call: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        lambda x, y: task.losses(model(x), y), dynamic=False, fullgraph=True
    )
    return call


def table(share: float, names: Sequence[str], seconds: float = 4.0) -> str:
    """Process-CPU milliseconds (20th percentile, interleaved), by model."""
    lines = ["| model | full | compiled, full | rows | compiled, at best | it / rows |", "|---|" + "--:|" * 5]
    for name in names:
        task = TIMED[name]
        torch.manual_seed(0)
        torch.compiler.reset()
        model = task.build()
        x, y = task.batch(task.n)
        chosen = torch.randperm(task.n)[: max(1, round(share * task.n))]
        few = (x[chosen], y[chosen])
        whole, part = _compiled(task, model), _compiled(task, model)

        def eager(x: Tensor, y: Tensor, task: Task = task, model: nn.Module = model) -> None:
            finish(model, task.losses(model(x), y))

        def step(losses: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, model: nn.Module = model) -> None:
            finish(model, losses(x, y))

        full, full_c, rows, forward_c, full_k, forward_k = interleaved(
            [
                functools.partial(eager, x, y),
                functools.partial(step, whole, x, y),
                functools.partial(on_rows, task, model, x, y, chosen),
                functools.partial(whole, x, y),
                functools.partial(step, part, *few),
                functools.partial(part, *few),
            ],
            seconds,
        )
        best = forward_c + full_k - forward_k
        lines.append(f"| {name} | {full:.1f} | {full_c:.1f} | {rows:.1f} | {best:.1f} | {best / rows:.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    selbp.keep_freed_memory()
    words = sys.argv[1:]
    shares = [float(word) for word in words if word[0] in "0."]
    print(table(shares[0] if shares else 0.25, [word for word in words if word in TIMED] or list(TIMED)))
