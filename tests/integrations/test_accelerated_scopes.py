"""Factors and counts in others' loops, with micro-batches and a choice for all ranks. No framework is needed."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.processes import in_two_processes
from support.training_kit import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.integrations.accelerate import AcceleratedStep
from selbp.integrations.scale import over_processes

EXACT = 1e-12
PARTS = 2  # minibatches of an optimizer step


class Loop:
    """What a step asks of an ``accelerate.Accelerator``, with the same meaning."""

    distributed_type = "NO"

    def __init__(self, processes: int = 1) -> None:
        self.num_processes, self.gradient_accumulation_steps, self.sync_gradients = processes, PARTS, True

    def register_for_checkpointing(self, part: Any) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.gradient_accumulation_steps).backward()


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def data(seed: int, n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, 6, generator=generator).double(), torch.randint(0, 5, (n,), generator=generator)
    y[: 3 * seed] = -100
    return x, y


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def check(rank: int) -> None:
    every = [data(seed) for seed in range(2 * PARTS)]
    count, plain = sum(int((y != -100).sum()) for _, y in every), network()
    sum(F.cross_entropy(plain(x), y, reduction="sum") for x, y in every).div(count).backward()  # type: ignore
    ways = [(scope, micro_batch, called) for scope in ("local", "global") for micro_batch, called in WAYS]
    for scope, micro_batch, called in ways:
        loop, model = Loop(2), DistributedDataParallel(network())
        options = {"selector": selbp.Full(), "keep": 1.0, "scope": scope, "micro_batch": micro_batch}
        step = AcceleratedStep(loop, model, **options)
        for part in range(PARTS):
            loop.sync_gradients = part == PARTS - 1
            x, y = every[PARTS * rank + part]
            with nullcontext() if loop.sync_gradients else model.no_sync():
                if called:
                    loop.backward(step(x, y, num_items_in_batch=count))
                else:
                    step.backward(x, y, normalizer=count)
        assert_same(gradients(model), gradients(plain), rtol=EXACT)
        assert step.optimizer_step == 1, (scope, micro_batch, called)


WAYS = [(None, True), (None, False), (5, False)]  # micro_batch, and whether the step is called


def check_a_trainers_count(rank: int) -> None:
    own, every = torch.tensor(5 + rank), 11
    for scope, across, count, factor in (
        ("local", True, every, 2.0),
        ("local", False, own, 1.0),
        ("global", True, every, 1.0),
        ("global", False, every, 1.0),
    ):
        trainer = SimpleNamespace(args=SimpleNamespace(average_tokens_across_devices=across), accelerator=Loop(2))
        model = DistributedDataParallel(network())
        step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, scope=scope)
        assert over_processes(trainer, step, every if across else own) == (count, factor), (scope, across)


def test_a_normalizer_in_two_processes() -> None:
    in_two_processes(check)


def test_a_trainers_count_in_two_processes() -> None:
    in_two_processes(check_a_trainers_count)


@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(3.0), lambda loss: loss * 8], ids=["1", ".5", "3", "call"])
@pytest.mark.parametrize("normalizer", [None, 20])
def test_micro_batches_train_as_one_forward(scale: Any, normalizer: int | None) -> None:
    found = []
    for micro_batch in (None, 5):
        loop, model = Loop(), network()
        step = AcceleratedStep(loop, model, selector=selbp.GradientMatching(), keep=0.5, micro_batch=micro_batch)
        if micro_batch is None:
            loss = step(*data(1), normalizer=normalizer)
            loop.backward(scale(loss) if callable(scale) else loss * scale)
        else:
            assert float(step.backward(*data(1), normalizer=normalizer, scale=scale)) == step.report.loss
        found.append(gradients(model))
    assert_same(*found, rtol=EXACT)


def test_micro_batches_are_counted_as_the_accelerator_counts() -> None:
    loop, schedule, seen = Loop(), selbp.Schedule(start=1), []
    step = AcceleratedStep(loop, network(), selector=selbp.TopLoss(), keep=0.25, micro_batch=5, schedule=schedule)
    for turn in range(4):
        loop.sync_gradients = turn % 2 == 1
        step.backward(*data(turn))
        seen.append((step.report.selected, step.optimizer_step))
        step.backward(*data(turn), selection=step.report.selection)  # a second pass is no other step
        assert step.optimizer_step == seen[-1][1]
    assert seen == [(False, 0), (False, 1), (True, 1), (True, 2)]


def test_micro_batches_where_the_engine_steps_at_each_backward() -> None:
    loop = Loop()
    loop.distributed_type = "DEEPSPEED"
    AcceleratedStep(loop, network(), selector=selbp.TopLoss(), keep=0.25)
    with pytest.raises(ValueError, match=r"micro_batch= .* DeepSpeed"):
        AcceleratedStep(loop, network(), selector=selbp.TopLoss(), keep=0.25, micro_batch=5)
