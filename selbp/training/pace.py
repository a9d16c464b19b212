"""Whether steps of a rule take longer than full steps would: looked at once, by the step's own clock.

A step times its scoring, the choice, the forward of the chosen rows and the backward. The look is taken over some
steps, of those whose backward is over, so that it waits for nothing. It changes no step.

What a full step takes is measured on rows and with a cut, whose graph is that of all rows anyway: what an operator's
Python costs there is not in proportion to the rows, so that nothing follows from the parts of a step. Where a second
forward runs, it is estimated from them: the memory may be too small for a full step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from selbp import allocator
from selbp._torch import without_autocast_cache
from selbp.common.batch import Batch
from selbp.common.buffers import buffers_put_back
from selbp.common.distributed import unwrap
from selbp.common.figures import median
from selbp.common.guards import random_state_put_back, without_autocast
from selbp.common.hooks import eagerly
from selbp.training.analysis import refuse_sharded
from selbp.training.report import StepReport
from selbp.training.stopwatch import AHEAD, Stopwatch

WARM = 3  # first steps, which allocate, decide and look at the samples
STEPS = 10  # whose medians count; 0: no look is taken
FULL_STEPS = 3  # whose median counts; always as many, so that a model with a state of its own sees no clock
MARGIN = 1.05  # what a clock and an estimate cannot tell apart from 1


class _Timed(NamedTuple):
    watch: Stopwatch
    share: float  # k / n
    way: str


class Pace:
    """Takes in the reports of scored steps, and warns once where their rule costs more than it saves."""

    def __init__(self, rule: Any, keep: float | int) -> None:
        self._rule, self._keep = rule, keep
        self._timed: list[_Timed] = []
        self._full: list[Stopwatch] | None = None  # of full steps, once they are to be measured
        self._seen = 0
        self.done = STEPS == 0

    @property
    def due(self) -> bool:
        """Whether full steps are to be measured before the next step."""
        return self._seen == WARM + STEPS and self._full is None and not self.done and self._timed[-1].way == "rows"

    def measure(self, model: nn.Module, batch: Batch, loss_of: Callable[[nn.Module, Batch], Tensor]) -> None:
        """Run some full steps on ``batch``; ``loss_of`` gives the () mean loss. No state is changed.

        Of several processes none does so: a forward that only some of them run may wait for the others.
        """
        self._full = []
        together = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        if together or torch.compiler.is_compiling():
            return
        try:
            self._full = full_steps(model, batch, loss_of)
        except Exception:  # a fault of the model comes up again
            return

    def add(self, report: StepReport) -> None:
        """One more step, whose backward may not have run; the ``STEPS`` before it are looked at once.

        One that is captured in a CUDA graph does not count: it has no time, and to look asks the GPU.
        """
        if report._watch.idle or not (report.scored or report.backward == "rows") or report.k >= report.n:
            return
        self._seen += 1
        if self._seen > WARM + STEPS:
            self.done = True  # before the look, whose warning may be an error
            timed, self._timed = self._timed, []
            self._look(timed, report)
        elif self._seen > WARM:
            self._timed.append(_Timed(report._watch, report.k / report.n, report.backward))

    def _look(self, steps: list[_Timed], report: StepReport) -> None:
        read = [(timed, timed.watch.parts()) for timed in steps if timed.watch.over]
        if len(read) < (STEPS + 1) // 2:  # a loop that calls no backward, or a device that is behind
            return
        whole = [_seconds(watch) for watch in self._full or () if watch.over]
        if report.backward == "rows" and not whole:
            return
        known = median(whole) if whole else None
        times = [(sum(parts.values()), known or full_seconds(timed, parts)) for timed, parts in read]
        price = median([own / max(full, 1e-12) for own, full in times])
        if price <= MARGIN:
            return
        phases = ("score", "select", "forward", "backward")
        seconds = {phase: median([timed.watch.seconds().get(phase, 0.0) for timed, _ in read]) for phase in phases}
        said = ", ".join(f"{phase} {1e3 * value:.3g} ms" for phase, value in seconds.items() if value)
        _warn(
            f'selbp: {self._rule!r} with backward="{report.backward}" at keep={self._keep} takes about {price:.2f} of '
            f"a full step's time here (medians of {len(read)} steps of {report.n} samples: {said}; forward and "
            f"backward of all of them would take about {1e3 * median([full for _, full in times]):.3g} ms). "
            f"selbp.diagnose(model, batch, keep, selector=rule) measures both{_hint(report)}"
        )


def _hint(report: StepReport) -> str:
    """Name what makes steps on a CPU faster, where it is not done yet."""
    on_cpu = report.selection.indices.device.type == "cpu"
    faulted = on_cpu and sys.platform.startswith("linux") and not allocator.kept()
    return "; selbp.keep_freed_memory(), called once, spares the page faults" if faulted else ""


def full_seconds(timed: _Timed, parts: dict[str, float]) -> float:
    """About what forward and backward of all rows take, by the parts of a step that chose some and ran them again.

    The smaller of two estimates. Both are too large where something costs as much for few rows as for all.
    """
    forward, backward = (parts.get(phase, 0.0) for phase in ("forward", "backward"))
    scored = parts.get(AHEAD, 0.0) + parts.get("score", 0.0)
    return min((forward + backward) / timed.share, scored * (1 + backward / max(forward, 1e-12)))


def full_steps(model: nn.Module, batch: Batch, loss_of: Callable[[nn.Module, Batch], Tensor]) -> list[Stopwatch]:
    """Forward and backward of all rows, some times. Gradients, buffers and random state are left as they are.

    Compiled parts run as they were written, slower.
    """
    device, watches = batch.device, list[Stopwatch]()
    inner = unwrap(model)  # a reducer must not see a forward without a backward
    refuse_sharded(inner)
    wanted = [p for p in inner.parameters() if p.requires_grad]
    batch = batch.take(torch.arange(batch.n, device=device))  # which the model may edit
    with random_state_put_back(device), buffers_put_back(inner), without_autocast_cache(), eagerly(inner):
        for _ in range(FULL_STEPS):
            watches.append(watch := Stopwatch(device))
            loss = loss_of(inner, batch)
            watch.lap("forward")
            with without_autocast(device):
                torch.autograd.grad(loss, wanted, allow_unused=True)
            watch.lap("backward")
    return watches


def _seconds(watch: Stopwatch) -> float:
    return sum(watch.parts().values())


def _warn(message: str) -> None:
    """Warn at the first line of the caller's that is not this package's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "selbp":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
