"""What a cut reports of its last backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from selbp.common.figures import WeightFigures
from selbp.common.keep import random_error
from selbp.common.proxies import HeadProxies
from selbp.cut.proxies import FlatProxies
from selbp.types import BatchStatistics, Selection


@dataclass
class CutReport(WeightFigures):
    """What a cut chose in its last backward; the properties synchronise with the device when read."""

    n: int  # samples whose gradients arrived
    k: int  # rows that went on
    selection: Selection  # indices among the minibatch's samples; weights as in sum_j w_j g_j ~ (1 / n) sum_i g_i
    dense: Counter[str] = field(default_factory=Counter)  # operators below the cut that ran on n rows
    _local: Selection | None = field(default=None, repr=False)
    _stats: BatchStatistics | None = field(default=None, repr=False)
    _proxies: FlatProxies | HeadProxies | None = field(default=None, repr=False)

    @cached_property
    def relative_residual(self) -> float | None:
        """||mean - sum w g|| / ||mean|| of the gradients at the cut; None where the rule looked at none."""
        if self._proxies is None or self._local is None:
            return None
        return float(self._proxies.matching_residual(self._local))

    @cached_property
    def gain(self) -> float | None:
        """Expected squared error of k rows drawn at random, over that of the chosen ones: above 1 the rule helps."""
        if self.relative_residual is None or self._stats is None or self._proxies is None:
            return None
        squares = float((self._stats.residual_sq * self._stats.feature_sq).double().sum())
        target_sq = float(self._proxies.mean_gradient().target_sq)
        expected = random_error(self.n, self.n, self.k, squares, target_sq)
        error = self.relative_residual**2 * target_sq
        return expected / error if error > 0 else float("inf") if expected else None
