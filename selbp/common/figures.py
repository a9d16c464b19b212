"""What a report says of the weights of its selection."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from typing import Any

from selbp.types import Selection


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
        return {**self.__dict__, "_proxies": None, **({"table": None} if "table" in self.__dict__ else {})}

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
