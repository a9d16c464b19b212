"""The figures of the steps since the last log line."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from selbp.training.report import OF_THE_TABLE, StepReport

FIGURES = ("relative_residual", "gain", "weight_sum", "effective_sample_size", *OF_THE_TABLE)
PHASES = ("score", "select", "forward", "backward")


class Window:
    """Collects reports without waiting for the device; :meth:`figures` reads them and starts anew."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._seconds: list[Callable[[], dict[str, float]]] = []
        self._hits: tuple[Tensor, Tensor] | None = None
        self._last: StepReport | None = None

    def add(self, report: StepReport) -> None:
        """Take in one step, before or after its backward."""
        self._last = report
        self._seconds.append(report._watch.seconds)
        found = report.hits()
        if found is not None:
            before = self._hits
            self._hits = found if before is None else (before[0] + found[0], before[1] + found[1])

    def figures(self, *, every: bool = True) -> dict[str, float]:
        """Accuracy over the window, mean seconds of a step's phases, and the last step's other figures.

        ``every`` also names the last step's loss. Empty where no step was taken; a figure that is not known is left
        out. Waits for the device.
        """
        last = self._last
        if last is None:
            return {}
        found: dict[str, float | None] = {"batch_loss": last.loss} if every else {}
        if self._hits is not None and int(self._hits[1]):
            found["batch_accuracy"] = int(self._hits[0]) / int(self._hits[1])
        for name in FIGURES:
            try:
                found[name] = getattr(last, name)
            except RuntimeError:  # a cut's, before its backward
                found[name] = None
        found |= {"kept": float(last.k), "samples": float(last.n)}
        seconds = [read() for read in self._seconds]
        for phase in PHASES:
            if values := [each[phase] for each in seconds if phase in each]:
                found[f"{phase}_seconds"] = sum(values) / len(values)
        self._begin()
        return {name: float(value) for name, value in found.items() if value is not None}
