"""A backward through chosen rows against the full step, a second forward on the rows, and the model's own bound.

The ideal is a backward that costs exactly its share: T_forward + f (T_full - T_forward). No kernel reaches it, since a
GEMM of fewer rows runs at a lower rate; ``benchmarks.tools.rows_auto`` prints what the kernels of k rows leave of it.
Process-CPU time is the clock to trust on a shared machine (``python -m benchmarks rows --clock process``). The
optimizer is not in it. The process keeps the memory that it frees, for all contenders: see ``selbp.keep_freed_memory``.

Programs that look further are ``rows_by_hand``, ``rows_dispatch``, ``rows_memory``, ``rows_auto`` and ``rows_compile``
in ``benchmarks.tools``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import selbp
from benchmarks.harness import Case, suite
from selbp_study.row_models import TIMED, Task

SHARES = (0.25,)  # `throughput` times whole steps at others
IDEAL = "the ideal: T_forward + f (T_full - T_forward)"


def _inputs(task: Task, share: float, device: torch.device) -> tuple[Any, ...]:
    model = task.build().to(device)
    x, y = (t.to(device) for t in task.batch(task.n))
    chosen = torch.randperm(task.n, device=device)[: max(1, round(share * task.n))]
    return model, x, y, chosen


def finish(model: nn.Module, losses: Tensor) -> None:
    """The backward, without gradients of a step before."""
    model.zero_grad(set_to_none=True)
    losses.mean().backward()


def on_rows(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    """A step whose backward runs through the chosen rows."""
    finish(model, selbp.select(task.losses(model(x), y), chosen))


def second_forward(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    with torch.no_grad():
        task.losses(model(x), y)
    finish(model, task.losses(model(x[chosen]), y[chosen]))


def full_step(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    finish(model, task.losses(model(x), y))


def _indexed(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    finish(model, task.losses(model(x), y)[chosen])


def forward_alone(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    return task.losses(model(x), y)


def ideal(share: float, seconds: Mapping[str, float]) -> float:
    """The seconds of a step whose backward costs its ``share`` of the full one, from those of contenders."""
    forward = seconds["forward alone"]
    return forward + share * (seconds["full step"] - forward)


def _case(name: str, share: float) -> Case:
    task = TIMED[name]
    contenders = {
        "ours": on_rows,
        "second forward on the rows": second_forward,
        "full step": full_step,
        "losses[indices], plain autograd": _indexed,
        "forward alone": forward_alone,
    }
    return Case(
        f"rows {name} n={task.n} keep={share}",
        functools.partial(_inputs, task, share),
        {label: functools.partial(run, task) for label, run in contenders.items()},
        formula=IDEAL,
        limits={"second forward on the rows": 1.0},
        quick=name == "MLP" and share == 0.25,
        ideal=functools.partial(ideal, share),
    )


CASES = [_case(name, share) for name in TIMED for share in SHARES]
test_rows = suite(CASES)
