"""``SelectiveBackprop(cut=...)``: a step with a forward on all rows and a cut at one module's output."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.batch import Batch
from selbp.common.buffers import Written
from selbp.common.figures import Choice
from selbp.common.keep import kept_rows
from selbp.common.modules import find_place
from selbp.cut.choice import Cut
from selbp.cut.recompute import RecomputedCut, check_reached, cut_at
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.selectors import Selector
from selbp.training.report import StepReport


class CutStepReport(StepReport):
    """A step's report whose figures are those of its cut, which chooses in the backward.

    Before the backward has run, reading a figure of the choice raises RuntimeError.
    """

    cut: CutReport | None = None

    def _choice(self) -> Choice:
        if self.cut is None:
            raise RuntimeError("the cut chooses in the backward, which has not run yet")
        return self.cut._choice()

    @cached_property
    def gain_at_cost(self) -> float | None:
        """None: what a cut costs depends on where it is."""
        return None


class PlacedCut:
    """A cut at the output of one module of a model. It is in place only while a step's forward runs.

    ``place`` is the module or its name. Raises ValueError if the model has no such module.
    """

    def __init__(
        self,
        model: nn.Module,
        place: nn.Module | str,
        keep: float | int,
        selector: Selector,
        generator: torch.Generator | None,
        *,
        recompute: bool,
        precision: str,
        batchnorm: BatchNormPolicy = "exact",
    ) -> None:
        self.name, self.module = find_place("cut", model, place)
        self._model = model
        self._cut = Cut(keep, selector, generator=generator, losses=None, proxy="pooled", batchnorm=batchnorm)
        self._recomputed = None
        if recompute:
            self._recomputed = RecomputedCut(model, self.module, self.name, self._cut, precision)

    @property
    def strategy(self) -> str:
        """How the layers below run backward: ``"rows"`` or ``"recompute"``."""
        return "rows" if self._recomputed is None else "recompute"

    def check_once(self, batch: Batch) -> None:
        """Run what is to be looked at once, before the first :meth:`feed`."""
        if self._recomputed is not None:
            self._recomputed.check_once(batch)

    def feed(self, batch: Batch, on_choice: Callable[[CutReport], None], written: Written) -> Any:
        """Run the forward and return the model's output. The backward calls ``on_choice`` when it has chosen.

        ``written`` is read where layers below run again.
        """
        if self._recomputed is not None and kept_rows(self._cut.keep, batch.n) < batch.n:
            return self._recomputed.feed(batch, on_choice, written)

        def attach(hidden: Tensor, features: Tensor | None) -> Tensor:
            return self._cut.attach(hidden, features, on_choice)

        with cut_at(self.module, self.name, attach) as runs:
            output = batch.feed(self._model)
        check_reached(runs, self._model, self.name)
        return output
