"""Whether steps of a rule take longer than full steps would: looked at once, by the step's own clock.

A step times its scoring, the choice, the forward of the chosen rows and the backward. From them follows about what a
full step takes. The look is taken over some steps, of those whose backward is over, so that it waits for nothing. It
changes no step.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NamedTuple

from selbp.sampling.auto import median
from selbp.training.report import StepReport
from selbp.training.stopwatch import AHEAD, Stopwatch

WARM = 3  # first steps, which allocate, decide and look at the samples
STEPS = 10  # whose medians count; 0: no look is taken
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
        self._seen = 0
        self.done = STEPS == 0

    def add(self, report: StepReport, full_over_forward: float | None) -> None:
        """One more step, whose backward may not have run; the ``STEPS`` before it are looked at once.

        ``full_over_forward``: what a full step takes over its forward, where that has been counted.
        """
        if not report.scored or report.k >= report.n:
            return
        self._seen += 1
        if self._seen > WARM + STEPS:
            self.done = True  # before the look, whose warning may be an error
            timed, self._timed = self._timed, []
            self._look(timed, full_over_forward, report)
        elif self._seen > WARM:
            self._timed.append(_Timed(report._watch, report.k / report.n, report.backward))

    def _look(self, steps: list[_Timed], full_over_forward: float | None, report: StepReport) -> None:
        read = [(timed, timed.watch.parts()) for timed in steps if timed.watch.over]
        if len(read) < (STEPS + 1) // 2:  # a loop that calls no backward, or a device that is behind
            return
        times = [(sum(parts.values()), full_seconds(timed, parts, full_over_forward)) for timed, parts in read]
        price = median([own / max(full, 1e-12) for own, full in times])
        if price <= MARGIN:
            return
        phases = ("score", "select", "forward", "backward")
        seconds = {phase: median([timed.watch.seconds().get(phase, 0.0) for timed, _ in read]) for phase in phases}
        said = ", ".join(f"{phase} {1e3 * value:.3g} ms" for phase, value in seconds.items())
        _warn(
            f'selbp: {self._rule!r} with backward="{report.backward}" at keep={self._keep} takes about {price:.2f} of '
            f"a full step's time here (medians of {len(read)} steps of {report.n} samples: {said}; forward and "
            f"backward of all of them would take about {1e3 * median([full for _, full in times]):.3g} ms). "
            "selbp.diagnose(model, batch, keep, selector=rule) measures both"
        )


def full_seconds(timed: _Timed, parts: dict[str, float], full_over_forward: float | None) -> float:
    """About what forward and backward of all rows take, by the parts of a step that chose some.

    The smaller of two estimates. Both are too large where something costs as much for few rows as for all.

    Rows that were asked for have the first one alone, in which what a call costs counts n / k times: few rows of a
    small network are slower than all of them, and nothing is said. The second one needs a look ahead, and only
    ``"auto"`` takes one. A fixed ratio to the forward would be wrong where gradients of parameters take the time.
    """
    ahead, forward, backward = (parts.get(phase, 0.0) for phase in (AHEAD, "forward", "backward"))
    if timed.way == "rows":
        most = ahead + backward / timed.share
        return most if full_over_forward is None else min(most, ahead * full_over_forward)
    scored = ahead + parts.get("score", 0.0)
    return min((forward + backward) / timed.share, scored * (1 + backward / max(forward, 1e-12)))


def _warn(message: str) -> None:
    """Warn at the first line of the caller's that is not this package's."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "selbp":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
