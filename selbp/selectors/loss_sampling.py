"""Rules that draw rows with odds that grow with the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from selbp._checks import check_choice, check_int, check_number
from selbp.ops._factors import in_dtype
from selbp.ops.choose_gradients import choose_by_percentile
from selbp.reference.sampling import uniform
from selbp.selectors.base import BaseSelector, Needs, check_state, state_tensor
from selbp.selectors.candidates import Candidates
from selbp.selectors.weighting import Weights
from selbp.types import Selection

# Odds of a row whose loss is the least of all: it is drawn when there is nothing else to fill the k slots with.
_LEAST = 1e-30
_MODES = ("mean", "batch", "unbiased")


@dataclass(eq=False)
class LossPercentile(BaseSelector):
    """Selective-Backprop (Jiang et al. 2019): odds by the loss's percentile among the last losses.

    The odds are ``p(l) = max(p_min, (#{h < l} / |h|)^beta)`` with h the last ``history`` valid losses, this batch's
    included. The source draws each row on its own with probability p(l), which keeps 1 / (beta + 1) of the rows in
    expectation. Here exactly k rows are drawn, with inclusion probabilities proportional to p(l), up to 1.

    Parameters
    ----------
    beta : float
        At least 0. 3 prefers high losses as the source does when it keeps a quarter.
    p_min : float
        In [0, 1]: the least odds.
    history : int
        How many losses are remembered.
    weights : {"mean", "batch", "unbiased"}
        ``"mean"`` (1 / k: the source does not reweight), ``"batch"`` (1 / n) or ``"unbiased"``, which needs ``p_min``
        > 0: without it the least loss has no chance.

    Raises
    ------
    TypeError, ValueError
        For an option of another type or a value that is not allowed. ``weights="unbiased"`` needs ``p_min`` > 0.

    See Also
    --------
    selbp.LossRank : compares the losses of one minibatch only.
    selbp.TopLoss : takes the largest losses, without chance.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> rule = selbp.LossPercentile(weights="mean")
    >>> rule.select(stats, k=2, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.5000, 0.5000])
    >>> rule.state_dict()["losses"].isfinite().sum()  # it remembers the minibatch
    tensor(4)
    """

    beta: float = 3.0
    p_min: float = 0.0
    history: int = 1024
    weights: Weights = "mean"
    _losses: Tensor | None = field(default=None, init=False, repr=False)  # (history,) float64, oldest first, NaN: none

    needs: ClassVar[Needs] = "loss"

    def __post_init__(self) -> None:
        self.beta = check_number("beta", self.beta, 0.0)
        self.p_min = check_number("p_min", self.p_min, 0.0, 1.0)
        self.history = check_int("history", self.history, 1)
        check_choice("weights", self.weights, _MODES)
        if self.weights == "unbiased" and self.p_min == 0.0:
            raise ValueError(
                "p_min must be > 0 for weights='unbiased': else the least loss has no chance at all, got 0"
            )

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Draw k rows; this batch's losses enter the history first."""
        loss, valid = rows.stats.loss, rows.stats.valid
        if self._losses is None:
            self._losses = loss.new_full((self.history,), torch.nan, dtype=torch.float64)
        least = max(self.p_min, _LEAST)
        indices, weights, self._losses = choose_by_percentile(
            loss,
            valid,
            self._losses.to(loss.device),
            uniform(rows.n + 1, loss, rows.generator),
            k,
            self.weights,
            self.beta,
            least,
            loss.dtype == torch.float32,
        )
        return Selection(indices, in_dtype(weights, loss.dtype))

    def state_dict(self) -> dict[str, Any]:
        """``losses`` (history,) float64: the last valid losses, oldest first, NaN where there were fewer."""
        losses = self._losses
        if losses is None:
            losses = torch.full((self.history,), torch.nan, dtype=torch.float64, device="cpu")
        return {"losses": losses.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict` of a rule with the same ``history``."""
        check_state(self, state, ("losses",))
        self._losses = state_tensor(state, "losses", (self.history,))


@dataclass(frozen=True)
class LossRank(BaseSelector):
    """Odds by the loss's rank in the minibatch, no history (Composer's variant of Selective-Backprop).

    Inclusion probabilities are proportional to ``((rank + 1/2) / v)^(1 / keep - 1)``, up to 1. Rank 0 is the least of
    the v valid losses, the lower index first among equals, and keep = k / v.

    Parameters
    ----------
    weights : {"mean", "batch", "unbiased"}
        ``"mean"`` (1 / k), ``"batch"`` (1 / n) or ``"unbiased"``.

    Raises
    ------
    ValueError
        For other ``weights``.

    See Also
    --------
    selbp.LossPercentile : compares with the losses of earlier minibatches as well.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.LossRank().select(stats, k=2, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.5000, 0.5000])
    """

    weights: Weights = "mean"

    needs: ClassVar[Needs] = "loss"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, _MODES)

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Draw k rows by their losses' ranks."""
        return rows.pick(rows.stats.loss, k, by="rank", weights=self.weights)
