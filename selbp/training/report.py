"""What a step reports. Nothing is read back from the device until someone looks."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selbp.ops.types import BatchStatistics, Selection
from selbp.training.budget import random_error, rows_at_cost, step_cost
from selbp.training.proxies import HeadProxies


class Stopwatch:
    """Seconds of a step's phases: by the host's clock on a CPU, by events on a GPU, read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self._recorded: dict[str, float] | None = None  # of a copy, which has no marks
        self._events = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("start", self._now())]
        self._backward: list[Any] = []

    def _now(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        """What ran since the last mark was ``phase``."""
        self._marks.append((phase, self._now()))

    def follow(self, loss: Tensor) -> None:
        """Time the backward of ``loss``, from its start to the end of the engine's run."""
        if loss.requires_grad:
            loss.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        self._backward = [self._now()]
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._backward.append(self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase; ``"backward"`` once it has run."""
        if self._recorded is not None:
            return dict(self._recorded)
        marks = list(self._marks)
        result = {
            phase: self._between(before, now) for (_, before), (phase, now) in zip(marks, marks[1:], strict=False)
        }
        if len(self._backward) == 2:
            result["backward"] = self._between(*self._backward)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """The seconds: a GPU's events exist in their process only."""
        return {"_recorded": self.seconds(), "_events": False, "_marks": [], "_backward": []}

    def _between(self, begin: Any, end: Any) -> float:
        if not self._events:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0


class WeightFigures:
    """What a report with a ``selection`` says of its weights.

    A copy, pickled or not, has every figure and no longer the gradient proxies that some follow from.
    """

    selection: Selection

    def __getstate__(self) -> dict[str, Any]:
        """The fields and every figure that is known: reads them, and so waits for the device."""
        for kind in type(self).__mro__:
            for name in [name for name, value in vars(kind).items() if isinstance(value, cached_property)]:
                with suppress(RuntimeError):  # a cut's report before its backward: not known
                    getattr(self, name)
        return {**self.__dict__, "_proxies": None}

    @cached_property
    def weight_sum(self) -> float:
        """Sum of the weights: the factor on the learning rate of the layers that run backward on k rows."""
        return float(self.selection.weights.double().sum())

    @cached_property
    def weight_max(self) -> float:
        """The greatest weight."""
        return float(self.selection.weights.max())

    @cached_property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2: k for equal weights, 1 where one row carries everything."""
        w = self.selection.weights.double()
        total = float(w.square().sum())
        return float(w.sum()) ** 2 / total if total else 0.0


@dataclass
class StepReport(WeightFigures):
    """One step's figures. The fields are known at once; the properties synchronise with the device when read.

    Figures that the step had no means to know are None: those that need gradients, where the rule looked at none;
    accuracy, for a loss without classes.
    """

    n: int  # samples of the minibatch
    k: int  # rows that ran backward
    step: int  # optimizer steps before this one
    selected: bool  # whether the rule chose; False outside the schedule: a full step, or rows drawn at random
    scored: bool  # whether a forward on all rows was paid for scoring
    backward: str  # the strategy used
    backward_reason: str  # and why
    selection: Selection = field(repr=False)  # rows and weights
    _stats: BatchStatistics = field(repr=False)
    _proxies: HeadProxies | None = field(repr=False)
    _chosen: Tensor = field(repr=False)  # (k,) scaled losses of the chosen rows
    _hits: tuple[Tensor, Tensor] | None = field(repr=False)
    _watch: Stopwatch = field(repr=False)
    share: Tensor | None = field(default=None, repr=False)  # () of an accumulated loss, where a normalizer was given

    @cached_property
    def loss(self) -> float:
        """Unweighted mean loss of the minibatch; of the chosen rows, where no others were scored."""
        return float(self.mean_loss())

    def mean_loss(self) -> Tensor:
        """() :attr:`loss` on the device: nothing waits."""
        valid = self._stats.valid
        if self.scored:
            return torch.where(valid, self._stats.loss, 0).sum() / self.n
        live = self.selection.weights != 0
        mean = torch.where(live, self._chosen, 0).sum() / live.sum().clamp(min=1)
        return mean * valid.sum() / self.n

    def hits(self) -> tuple[Tensor, Tensor] | None:
        """() correctly classified entries and () all entries on the device; None for a loss without classes."""
        return self._hits

    @cached_property
    def accuracy(self) -> float | None:
        """Share of correctly classified entries, of the rows that :attr:`loss` is about."""
        if self._hits is None:
            return None
        correct, total = (int(x) for x in self._hits)
        return correct / total if total else None

    @cached_property
    def relative_residual(self) -> float | None:
        """||mean - sum w g|| / ||mean|| of the head's gradients; None where the mean is zero."""
        if self._proxies is None:
            return None
        value = float(self._proxies.matching_residual(self.selection))
        return value if math.isfinite(value) else None

    @cached_property
    def gain(self) -> float | None:
        """Expected squared error of k rows drawn at random, over that of the chosen ones: above 1 the rule helps."""
        return self._gain(self.k)

    @cached_property
    def gain_at_cost(self) -> float | None:
        """The same against as many random rows as this step's cost would pay for, without a scoring forward."""
        return self._gain(rows_at_cost(self.n, step_cost(self.n, self.k, scored=True, backward=self.backward)))

    def _gain(self, k: int) -> float | None:
        if self._proxies is None or self.relative_residual is None:
            return None
        valid = self._stats.valid
        squares = torch.where(valid, self._stats.residual_sq * self._stats.feature_sq, 0).double().sum()
        target_sq = float(self._proxies.mean_gradient().target_sq)
        expected = random_error(self.n, int(valid.sum()), k, float(squares), target_sq)
        error = self.relative_residual**2 * target_sq
        return expected / error if error > 0 else float("inf") if expected else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the phases score, select, forward and, once it has run, backward."""
        return self._watch.seconds()

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, ready for a log line."""
        names = (
            "n", "k", "step", "selected", "scored", "backward", "backward_reason", "loss", "accuracy", "weight_sum",
            "weight_max", "effective_sample_size", "relative_residual", "gain", "gain_at_cost", "seconds",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
