"""What a comparison found, in numbers: one line an arm, mean and deviation over seeds, paired difference to random."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from selbp_study.compare import Outcome
from selbp_study.text import plain

PHASES = ("score", "select", "forward", "backward", "optimizer")
BASELINE = "random"
# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom.
T95 = tuple(
    float(value)
    for value in (
        "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 "
        "2.120 2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042 "
    ).split()
)


def t95(degrees: int) -> float:
    """The factor of a two-sided 95 % interval; beyond 30 degrees of freedom that of 30, which is a little wide."""
    if degrees < 1:
        raise ValueError(f"degrees must be at least 1, got {degrees}")
    return T95[min(degrees, len(T95)) - 1]


@dataclass
class Line:
    """One arm over its seeds. Accuracies in per cent, times in seconds of one run."""

    name: str  # of the arm
    label: str
    keep: float | int
    lr: float
    results: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def accuracies(self) -> list[float]:
        """Test accuracy of each run."""
        return [result["accuracy"] for result in self.results]

    def mean(self) -> float:
        """Mean test accuracy."""
        return statistics.fmean(self.accuracies())

    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies()) if len(self.results) > 1 else None

    def seconds(self, phase: str) -> float:
        """Median over seeds of a phase's seconds, or of the whole steps' (``total``)."""
        return statistics.median(result["seconds"][phase] for result in self.results)

    def accuracy_at(self, seconds: float) -> float:
        """Mean over seeds of the test accuracy after so many seconds, between two evaluations in proportion."""
        return statistics.fmean(_between(result["curve"], seconds) for result in self.results)

    def by_seed(self) -> dict[int, float]:
        """Accuracy by seed."""
        return {result["config"]["seed"]: result["accuracy"] for result in self.results}


def _between(curve: Sequence[dict[str, Any]], seconds: float) -> float:
    """The accuracy of a curve at ``seconds``; its last one beyond its end."""
    points = sorted((point["seconds"], point["accuracy"]) for point in curve)
    for (begin, low), (end, high) in itertools.pairwise(points):
        if begin <= seconds < end:
            return low + (high - low) * (seconds - begin) / (end - begin)
    return points[-1][1] if seconds >= points[-1][0] else points[0][1]


def lines_of(outcomes: Sequence[Outcome]) -> list[Line]:
    """The table's lines in the order of the arms."""
    lines: dict[str, Line] = {}
    for outcome in outcomes:
        arm, config = outcome.arm, outcome.config
        line = lines.setdefault(arm.name, Line(arm.name, arm.label, config.keep, config.lr))
        if outcome.result is not None:
            line.results.append(outcome.result)
        else:
            line.errors.append(f"seed {config.seed}: {outcome.error}")
    return list(lines.values())


def paired_difference(line: Line, baseline: Line) -> tuple[float, float | None] | None:
    """Mean of ``line - baseline`` over the seeds that both have, and half its 95 % t interval (None for one seed)."""
    mine, theirs = line.by_seed(), baseline.by_seed()
    differences = [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]
    if not differences:
        return None
    if len(differences) == 1:
        return differences[0], None
    half = t95(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences), half


HEADINGS = (
    "arm",
    "keep",
    "lr",
    "test accuracy, %",
    "minus random, points",
    "at equal seconds, %",
    "backward samples",
    "forward, s",
    "select, s",
    "backward, s",
    "total, s",
)


def rows_of(lines: Sequence[Line]) -> list[list[str]]:
    """The table's cells, as text, under :data:`HEADINGS`."""
    baseline = next((line for line in lines if line.name == BASELINE and line.results), None)
    least = min((line.seconds("total") for line in lines if line.results), default=0.0)
    rows = []
    for line in lines:
        keep = line.keep if isinstance(line.keep, str) else f"{line.keep:g}"
        keep = f"{keep} rows" if isinstance(line.keep, int) else "all" if line.keep == 1 else keep
        head = [line.label, keep, f"{line.lr:g}"]
        if not line.results:
            rows.append([*head, f"failed: {line.errors[0]}", *["-"] * (len(HEADINGS) - 4)])
            continue
        spread = line.deviation()
        accuracy = f"{line.mean():.2f}" + ("" if spread is None else f" ± {spread:.2f}")
        if line.errors:
            accuracy += f" ({len(line.errors)} of {len(line.errors) + len(line.results)} seeds failed)"
        difference = None if baseline is None or baseline is line else paired_difference(line, baseline)
        against = "-"
        if difference is not None:
            middle, half = difference
            against = f"{middle:+.2f}" + ("" if half is None else f" [{middle - half:+.2f}, {middle + half:+.2f}]")
        samples = statistics.median(result["backward_samples"] for result in line.results)
        forward = line.seconds("score") + line.seconds("forward")
        times = [f"{seconds:.2f}" for seconds in (forward, *map(line.seconds, ("select", "backward", "total")))]
        equal = f"{line.accuracy_at(least):.2f}"
        rows.append([*head, accuracy, against, equal, f"{samples:,.0f}".replace(",", " "), *times])
    return rows


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown, columns aligned; marks in names and errors are escaped."""
    rows = [list(HEADINGS), *([plain(cell) for cell in row] for row in rows_of(lines))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]

    def text(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = "|".join(
        "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":" for column, width in enumerate(widths)
    )
    return "\n".join([text(rows[0]), f"|{rule}|", *map(text, rows[1:])]) + "\n"
