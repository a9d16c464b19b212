"""Paired differences over seeds: t intervals, p-values, Holm's correction, and a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ahead", "behind", "no difference", "-"]


def t_tail(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's t with a whole number of degrees of freedom, by the finite series.

    Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine_sq = math.sin(angle), math.cos(angle) ** 2
    term, total = 1.0, 0.0
    if degrees % 2:
        for index in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine_sq * (2 * index) / (2 * index + 1)
        inside = 2 / math.pi * (angle + sine * math.cos(angle) * total)
    else:
        for index in range(1, degrees // 2 + 1):
            total += term
            term *= cosine_sq * (2 * index - 1) / (2 * index)
        inside = sine * total
    return max(0.0, 1.0 - inside)


def t_quantile(tail: float, degrees: int) -> float:
    """The t with P(|T| > t) = ``tail``: the factor of a two-sided interval of level 1 - tail."""
    if not 0.0 < tail < 1.0:
        raise ValueError(f"tail must lie in (0, 1), got {tail}")
    low, high = 0.0, 1.0
    while t_tail(high, degrees) > tail:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, degrees) > tail else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Mean of the paired differences, half its 95 % interval and p (None for one pair)."""

    mean: float
    half: float | None
    p: float | None
    pairs: int

    def verdict(self, p: float | None = None) -> Verdict:
        """``p`` replaces this difference's own, after a correction."""
        p = self.p if p is None else p
        if p is None:
            return "-"
        return "no difference" if p >= 0.05 else "ahead" if self.mean > 0 else "behind"

    def text(self) -> str:
        """``+.31 [-.02, +.64]``, in points."""
        if self.half is None:
            return f"{self.mean:+.2f}"
        return f"{self.mean:+.2f} [{self.mean - self.half:+.2f}, {self.mean + self.half:+.2f}]"


def paired(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """The difference over the seeds that both have; None where they have none in common."""
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    n = len(differences)
    if n < 2:
        return Difference(differences[0], None, None, 1) if n else None
    mean, error = statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(n)
    if error == 0.0:
        return Difference(mean, 0.0, 0.0 if mean else 1.0, n)
    return Difference(mean, t_quantile(0.05, n - 1) * error, t_tail(mean / error, n - 1), n)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: those below .05 may all be claimed with 5 % of a single false one among them."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    adjusted, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = worst
    return adjusted
