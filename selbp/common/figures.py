"""The figures that the reports of a step and of a cut share: weights, residual and gain of the chosen rows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from selbp.common.keep import random_error
from selbp.types import BatchStatistics, MeanGradient, Selection


class Measured(Protocol):
    """Gradient proxies that can measure a selection: ``HeadProxies`` and ``FlatProxies``."""

    def mean_gradient(self) -> MeanGradient:
        """Return the mean gradient's products and norm."""

    def matching_residual(self, selection: Selection) -> Tensor:
        """Return () ``||M - sum_j w_j g_j|| / ||M||``."""


class Choice(NamedTuple):
    """A choice of k rows, and what is known of the rows among which it was made."""

    weights: Tensor  # (k,)
    selection: Selection  # (k,) rows among those that stats and proxies are about, and their weights
    stats: BatchStatistics | None  # (n,) of the rows among which it was made
    proxies: Measured | None  # their gradients; None if the rule looked at none


class SelectionFigures:
    """Base of the reports. A subclass says by :meth:`_choice` which choice its figures are about.

    A copy, pickled or not, has every figure, but not the gradient proxies that some figures follow from.
    """

    def _choice(self) -> Choice:
        """Return the choice. Raises RuntimeError if it has not been made yet."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields and every figure that is known. Reads the figures, and so waits for the device."""
        for kind in type(self).__mro__:
            for name in [name for name, value in vars(kind).items() if isinstance(value, cached_property)]:
                with suppress(RuntimeError):  # a figure of a choice that has not been made yet
                    getattr(self, name)
        return {**self.__dict__, "_proxies": None, **({"table": None} if "table" in self.__dict__ else {})}

    @cached_property
    def weight_sum(self) -> float:
        """The sum of the weights, a factor on the learning rate of the layers that run backward on k rows."""
        return float(self._choice().weights.double().sum())

    @cached_property
    def weight_max(self) -> float:
        """The greatest weight."""
        return float(self._choice().weights.max())

    @cached_property
    def effective_sample_size(self) -> float:
        """The number of rows for equal weights, 1 if one row has all the weight; (sum w)^2 / sum w^2."""
        w = self._choice().weights.double()
        total = float(w.square().sum())
        return float(w.sum()) ** 2 / total if total else 0.0

    @cached_property
    def relative_residual(self) -> float | None:
        """||mean - sum w g|| / ||mean|| of the gradients. None if the rule looked at none, or the mean is zero."""
        _, selection, _, proxies = self._choice()
        if proxies is None:
            return None
        value = float(proxies.matching_residual(selection))
        return value if math.isfinite(value) else None

    @cached_property
    def gain(self) -> float | None:
        """Expected squared error of k rows drawn at random, over that of the chosen ones; above 1 the rule helps."""
        return self._gain_over(len(self._choice().weights))

    def _gain_over(self, k: int) -> float | None:
        """Return the expected squared error of k random rows over that of the chosen ones; None if it is not known."""
        _, _, stats, proxies = self._choice()
        if stats is None or proxies is None or self.relative_residual is None:
            return None
        valid = stats.valid
        squares = torch.where(valid, stats.residual_sq * stats.feature_sq, 0).double().sum()
        target_sq = float(proxies.mean_gradient().target_sq)
        expected = random_error(len(valid), int(valid.sum()), k, float(squares), target_sq)
        error = self.relative_residual**2 * target_sq
        return expected / error if error > 0 else float("inf") if expected else None


def median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two in the middle; ``statistics`` would load four modules for it."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
