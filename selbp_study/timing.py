"""A training step and where its time goes, by a clock that other programs do not move.

On a CPU that clock is the processor time of this process, summed over its threads: what a busy machine takes away, by
running another program in between, is not counted. On a GPU the host waits, so that the wall clock and the device's
events are the measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selbp.training import Schedule, SelectiveBackprop
from selbp_study.arms import build_selector, options_of
from selbp_study.config import RunConfig
from selbp_study.models import HEAD, place_of
from selbp_study.sampled import Sampling

PARTS = ("score", "select", "forward", "backward", "optimizer")  # of a step
PHASES = (*PARTS, "total")
CLOCKS = {"process": time.process_time, "wall": time.perf_counter}


def clock_for(device: str | torch.device) -> str:
    """The name in :data:`CLOCKS` of what times a step on ``device``."""
    return "process" if torch.device(device).type == "cpu" else "wall"


class TimedStep(SelectiveBackprop):
    """A step that notes by ``clock`` when its rule begins to choose and when it has chosen."""

    clock: Callable[[], float] = time.process_time
    choice: tuple[float, float] | None = None  # of the last forward; None where no rule was asked

    def _select(self, *arguments: Any, **options: Any) -> Any:
        begun = self.clock()
        try:
            return super()._select(*arguments, **options)
        finally:
            self.choice = begun, self.clock()


def wrapper_of(
    config: RunConfig, model: nn.Module, generator: torch.Generator, own: Mapping[str, Any] | None = None
) -> TimedStep:
    """The training step that ``config`` describes. ValueError for options that do not exist or do not go together.

    ``own`` are options that stand above the configuration's.
    """
    options: dict[str, Any] = {"keep": config.keep, "backward": config.backward, "scoring": config.scoring}
    options |= {"head_gradient": config.head_gradient, **Sampling.split(options_of(config.options))[1]}
    options |= {"cut": place_of(config.model, config.cut)} if config.cut else {"head": HEAD}
    schedule = {name: options.pop(name) for name in ("start", "end", "every", "between") if name in options}
    try:
        options["schedule"] = Schedule(**schedule)
        options |= own or {}
        return TimedStep(model, selector=build_selector(config.selector), generator=generator, **options)
    except TypeError as error:
        raise ValueError(f"training options {config.options!r}: {error}") from error


def phases_of(choice: tuple[float, float] | None, begun: float, forward: float, backward: float) -> dict[str, float]:
    """Seconds of each phase of a step that began at ``begun``; the forward and the backward ended at the others.

    A cut's rule chooses within the backward, whose time then holds it.
    """
    chosen = choice or (begun, begun)
    return {
        "score": chosen[0] - begun,
        "select": chosen[1] - chosen[0],
        "forward": forward - chosen[1],
        "backward": backward - forward,
    }


def typical(steps: Tensor) -> Tensor:
    """(len(PHASES),) seconds of a step: the medians of the (m, len(PHASES) + 1) rows of a window.

    Where the rule chose on some steps only (the last column), the two kinds' medians, weighted by how many they are.
    """
    chose = steps[:, -1] > 0
    kinds = [kind[:, :-1] for kind in (steps[chose], steps[~chose]) if len(kind)]
    return torch.stack([kind.median(0).values * (len(kind) / len(steps)) for kind in kinds]).sum(0)


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Let torch use ``threads`` threads inside the block; 0 leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
