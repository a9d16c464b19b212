"""What a comparison found, in numbers: one line an arm, mean and deviation over seeds, paired difference to random."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from selbp_study.compare import Outcome
from selbp_study.plots import Curve
from selbp_study.statistics import paired
from selbp_study.text import markdown_table, one_line, plain

BASELINE = "random"


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

    def milliseconds(self, phase: str = "total") -> float:
        """Median over seeds of a phase's milliseconds in one step, or of the whole step's."""
        return 1e3 * self.seconds(phase) / float(self.results[0]["steps"])

    def curve(self, axis: str) -> Curve:
        """Means over seeds at each evaluation; ``axis`` is ``"backward_samples"``, in thousands, or ``"seconds"``."""
        shortest = min(len(result["curve"]) for result in self.results)
        points = list(zip(*(result["curve"][:shortest] for result in self.results), strict=True))
        at = [statistics.fmean(point[axis] for point in seeds) for seeds in points]
        accuracies = [[point["accuracy"] for point in seeds] for seeds in points]
        x = [value / 1e3 for value in at] if axis == "backward_samples" else at
        return Curve(self.label, x, *([of(values) for values in accuracies] for of in (statistics.fmean, min, max)))

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
        difference = None if baseline is None or baseline is line else paired(line.by_seed(), baseline.by_seed())
        against = "-" if difference is None else difference.text()
        samples = statistics.median(result["backward_samples"] for result in line.results)
        forward = line.seconds("score") + line.seconds("forward")
        times = [f"{seconds:.2f}" for seconds in (forward, *map(line.seconds, ("select", "backward", "total")))]
        equal = f"{line.accuracy_at(least):.2f}"
        rows.append([*head, accuracy, against, equal, f"{samples:,.0f}".replace(",", " "), *times])
    return rows


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown, columns aligned; marks in names and errors are escaped."""
    return _aligned(lines, plain)


def on_terminal(lines: Sequence[Line]) -> str:
    """The same table for a terminal, where an escaped mark would show its backslash."""
    return _aligned(lines, one_line)


def _aligned(lines: Sequence[Line], written: Callable[[str], str]) -> str:
    return markdown_table(HEADINGS, [[written(cell) for cell in row] for row in rows_of(lines)], aligned=True) + "\n"
