"""``SelectiveBackprop(cut=...)``: an ordinary full step on all rows, with a cut placed at one module's output."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from selbp.common.batch import Batch
from selbp.common.distributed import unwrap
from selbp.cut.choice import Cut
from selbp.cut.recompute import RecomputedCut, check_reached, cut_at
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.selectors import Selector
from selbp.training.report import StepReport


class CutStepReport(StepReport):
    """A step's report whose selection is the one that the cut makes in the backward: before it, figures are None."""

    cut: CutReport | None = None

    @cached_property
    def weight_sum(self) -> float:
        """Sum of the cut's weights."""
        return self._made.weight_sum

    @cached_property
    def weight_max(self) -> float:
        """The cut's greatest weight."""
        return self._made.weight_max

    @cached_property
    def effective_sample_size(self) -> float:
        """(sum w)^2 / sum w^2 of the cut's weights."""
        return self._made.effective_sample_size

    @cached_property
    def relative_residual(self) -> float | None:
        """||mean - sum w g|| / ||mean|| of the gradients at the cut."""
        return self._made.relative_residual

    @cached_property
    def gain(self) -> float | None:
        """See :attr:`CutReport.gain`."""
        return self._made.gain

    @cached_property
    def gain_at_cost(self) -> float | None:
        """None: what a cut costs depends on where it is."""
        return None

    @property
    def _made(self) -> CutReport:
        if self.cut is None:
            raise RuntimeError("the cut chooses in the backward, which has not run yet")
        return self.cut


class PlacedCut:
    """A cut at the output of one module of a model, for as long as a step's forward runs."""

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
        names = {name: module for name, module in unwrap(model).named_modules() if name}
        if isinstance(place, str):
            outer = dict(model.named_modules())  # a wrapper's own name for the same module is as good
            if place not in names and (not place or place not in outer):
                raise ValueError(f"cut={place!r} names no module of the model; it has {', '.join(names)}")
            self.name, self.module = place, names[place] if place in names else outer[place]
        else:
            found = [name for name, module in names.items() if module is place]
            if not found:
                raise ValueError(f"cut must be a module of the model, or its name, got another {type(place).__name__}")
            self.name, self.module = found[0], place
        self._model = model
        self._cut = Cut(keep, selector, generator=generator, losses=None, proxy="pooled", batchnorm=batchnorm)
        self._recomputed = None
        if recompute:
            self._recomputed = RecomputedCut(model, self.module, self.name, self._cut, precision)

    @property
    def strategy(self) -> str:
        """How the layers below run backward."""
        return "rows" if self._recomputed is None else "recompute"

    def feed(self, batch: Batch, report: list[CutStepReport]) -> Any:
        """The model's output; what its backward chooses goes to the report that ``report`` holds by then."""

        def made(found: CutReport) -> None:
            for entry in report:
                entry.cut = found

        if self._recomputed is not None:
            return self._recomputed.feed(batch, made)
        with cut_at(self.module, self.name, lambda hidden, features: self._cut.attach(hidden, features, made)) as runs:
            output = batch.feed(self._model)
        check_reached(runs, self._model, self.name)
        return output
