"""Seconds of a step's phases."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from selbp.ops._backends import capturing
from selbp.rows.engine import when_backward_ends

AHEAD = "forward of all"  # the part of "score" that a full step has as well: its forward, and losses with a graph


class Stopwatch:
    """Seconds of a step's phases: by the host's clock on a CPU, by events on a GPU, read only when asked for.

    Nothing is timed while a CUDA graph is captured: an event that was recorded there has no time of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._recorded: dict[str, float] | None = None  # of a copy, which has no marks
        self._events, self._device = device.type == "cuda", device
        self.idle = capturing(device)  # then no event may be recorded, nor asked
        self._marks: list[tuple[str, Any]] = [("start", self._now())]
        self._backward: list[Any] = []

    def _now(self) -> Any:
        if self.idle:
            return None
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def lap(self, phase: str) -> None:
        """What ran since the last mark was ``phase``."""
        self._marks.append((phase, self._now()))

    def follow(self, loss: Tensor) -> None:
        """Time the backward of ``loss``, from its start to the end of the engine's run."""
        if loss.requires_grad and not self.idle:
            loss.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self._backward = [self._now()]
        when_backward_ends(lambda: self._backward.append(self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase; ``"backward"`` once it has run; empty for a step that was captured in a CUDA graph."""
        if self._recorded is not None:
            return dict(self._recorded)
        found = self.parts()
        if AHEAD in found:
            return {"score": found.pop(AHEAD) + found.pop("score", 0.0), **found}
        return found

    def parts(self) -> dict[str, float]:
        """The same with the forward of ``"score"`` as a part of its own, ``AHEAD``."""
        if self.idle or self._recorded is not None:
            return {}
        marks = list(self._marks)
        result: dict[str, float] = {}
        for (_, before), (phase, now) in zip(marks, marks[1:], strict=False):  # a phase of micro-batches comes again
            result[phase] = result.get(phase, 0.0) + self._between(before, now)
        if len(self._backward) == 2:
            result["backward"] = self._between(*self._backward)
        return result

    @property
    def over(self) -> bool:
        """Whether the backward has run, so that reading waits for nothing."""
        if self.idle or self._recorded is not None:
            return False
        if len(self._backward) == 2:
            marks = self._backward
        elif self._marks[-1][0] == "backward":
            marks = [now for _, now in self._marks]
        else:
            return False
        return not self._events or all(event.query() for event in marks)

    def __getstate__(self) -> dict[str, Any]:
        """The seconds: a GPU's events exist in their process only."""
        return {"_recorded": self.seconds(), "_events": False, "idle": False, "_marks": [], "_backward": []}

    def _between(self, begin: Any, end: Any) -> float:
        if not self._events:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0
