"""On which steps rows are chosen, and what a step costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from selbp._checks import check_choice, check_int


@dataclass(frozen=True)
class Schedule:
    """On which optimizer steps rows are chosen: step t where ``start <= t < end`` and ``(t - start) % every == 0``.

    All remaining steps are full steps. With ``between="random"``, the remaining steps in [start, end) train on as many
    rows drawn at random, and score nothing.

    Parameters
    ----------
    start : int
        The first step that chooses; steps count from 0.
    end : int or None
        The first step that does not choose any more; None for never.
    every : int
        1 chooses on every step, 2 on every second one.
    between : {"full", "random"}
        What the steps in between do.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.SelectiveBackprop : takes a schedule, and counts optimizer steps.

    Examples
    --------
    >>> import selbp
    >>> schedule = selbp.Schedule(start=2, every=2, between="random")
    >>> [schedule.selects(step) for step in range(6)]
    [False, False, True, False, True, False]
    >>> [schedule.draws(step) for step in range(6)]
    [False, False, False, True, False, True]
    """

    start: int = 0
    end: int | None = None
    every: int = 1
    between: Literal["full", "random"] = "full"

    def __post_init__(self) -> None:
        check_choice("between", self.between, ("full", "random"))
        for name, low in (("start", 0), ("every", 1), ("end", None)):
            value = getattr(self, name)
            if name != "end" or value is not None:
                low = self.start if low is None else low
                object.__setattr__(self, name, check_int(name, value, low, "an int (a number of optimizer steps)"))

    def selects(self, step: int) -> bool:
        """Whether the rule chooses the rows of optimizer step ``step``."""
        return self._covers(step) and (step - self.start) % self.every == 0

    def draws(self, step: int) -> bool:
        """Whether the rows of optimizer step ``step`` are drawn at random in its place."""
        return self.between == "random" and self._covers(step) and not self.selects(step)

    def _covers(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)


def step_cost(n: int, k: int, *, scored: bool, backward: str) -> float:
    """Cost of a step that keeps k of n rows, in forwards of n rows: a backward counts 2, so the full step costs 3.

    A scoring forward adds 1; ``"recompute"`` runs forward and backward of k rows, ``"rows"`` the backward only.
    """
    share = k / n
    return (1.0 if scored else 0.0) + (2.0 if backward == "rows" else 3.0) * share


def rows_at_cost(n: int, cost: float) -> int:
    """How many of n rows random selection, which pays no scoring forward, can train on at ``cost`` forwards."""
    return max(1, min(n, math.floor(cost / 3.0 * n + 1e-9)))
