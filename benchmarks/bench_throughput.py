"""Whole training steps of five models: full, on chosen rows of one forward, on a second forward, and with a cut.

A step is the forward on all n samples, what a rule computes from it, the choice, and the backward; the optimizer, which
every step pays alike, stands apart as a row of its own. The ideal is a backward that costs exactly its share f of the
full one and a choice that costs nothing: T_forward + f (T_full - T_forward). A cut keeps the gradients above it exact,
so it runs more than f of the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import selbp
from benchmarks.bench_rows import IDEAL, ideal
from benchmarks.harness import Case, Unavailable, suite
from benchmarks.peers.selection import select_using_loss
from selbp_study.row_models import TIMED, Task

SHARES = (0.1, 0.25, 0.5)
CUTS = {
    "MLP": "5",
    "CNN": "9",
    "ResNet-GN": "6",
    "ViT": "blocks.2",
    "GPT": "blocks.2",
}  # a layer or block below the top


class _Ready(NamedTuple):
    model: nn.Module
    x: Tensor
    y: Tensor
    steps: Mapping[str, selbp.SelectiveBackprop]
    optimizer: torch.optim.Optimizer


def _inputs(name: str, share: float, device: torch.device) -> tuple[_Ready]:
    task = TIMED[name]
    model = task.build().to(device)
    x, y = (t.to(device) for t in task.batch(task.n))
    step = partial(selbp.SelectiveBackprop, model, keep=share, loss=task.losses)
    steps = {
        "rows, top loss": step(selector=selbp.TopLoss(), backward="rows"),
        "rows, matching": step(selector=selbp.GradientMatching(), backward="rows"),
        "recompute": step(selector=selbp.TopLoss(), backward="recompute"),
        "cut": step(selector=selbp.GradientMatching(), cut=CUTS[name]),
    }
    copies = [p.detach().clone() for p in model.parameters()]  # with gradients, which the steps free
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    return (_Ready(model, x, y, steps, torch.optim.AdamW(copies, foreach=True)),)


def _finish(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    model.zero_grad(set_to_none=True)


def _selective(which: str, ready: _Ready) -> None:
    _finish(ready.model, ready.steps[which](ready.x, ready.y))


def _full(task: Task, ready: _Ready) -> None:
    _finish(ready.model, task.losses(ready.model(ready.x), ready.y).mean())


def _forward(task: Task, ready: _Ready) -> Tensor:
    return task.losses(ready.model(ready.x), ready.y)


def _composer(task: Task, share: float, rule: Any, ready: _Ready) -> None:
    def losses(output: Tensor, target: Tensor, reduction: str) -> Tensor:
        return task.losses(output, target)

    x, y = rule(ready.x, ready.y, ready.model, losses, share)
    _finish(ready.model, task.losses(ready.model(x), y).mean())


def _case(name: str, share: float) -> Case:
    task, composer = TIMED[name], select_using_loss()
    contenders: dict[str, Callable[..., object] | Unavailable] = {
        "ours": partial(_selective, "rows, top loss"),
        "ours: matching": partial(_selective, "rows, matching"),
        f"ours: matching, cut at {CUTS[name]}": partial(_selective, "cut"),
        "ours: recompute": partial(_selective, "recompute"),
        "full step": partial(_full, task),
        "Composer select_using_loss, then its second forward": composer
        if isinstance(composer, Unavailable)
        else partial(_composer, task, share, composer),
        "forward alone": partial(_forward, task),
        "AdamW step alone": lambda ready: ready.optimizer.step(),
    }
    return Case(
        f"step of {name} n={task.n} keep={share}",
        partial(_inputs, name, share),
        contenders,
        formula=IDEAL,
        limits={"Composer select_using_loss, then its second forward": 1.0},
        quick=name == "MLP" and share == 0.25,
        rounds=5,
        ideal=partial(ideal, share),
        samples=task.n,
    )


CASES = [_case(name, share) for name in TIMED for share in SHARES]
test_throughput = suite(CASES)
