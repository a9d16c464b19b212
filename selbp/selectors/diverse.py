"""Diversified draws: rows that together span the mean gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from selbp._checks import check_choice
from selbp.reference.sampling import uniform
from selbp.selectors.base import BaseSelector, Needs
from selbp.selectors.candidates import Candidates
from selbp.types import Selection


@dataclass(frozen=True)
class DivBS(BaseSelector):
    """Diversified batch selection (Hong et al. 2024, algorithm 1): a randomised matching pursuit without its weights.

    Repeat k times: draw a row i, not drawn before, with odds ``|g_i . e|``, e what the rows so far do not span of the
    mean gradient; then take g_i's direction out of e. Rows that add nothing are drawn uniformly, and only once e is
    spent. The gradients are never formed: with K = L L^T pivoted at the draws, e's inner products and L's columns
    follow from K alone.

    Parameters
    ----------
    weights : {"mean", "batch"}
        ``"mean"`` (1 / k, the source's) or ``"batch"`` (1 / n).

    Examples
    --------
    >>> import torch, selbp
    >>> _ = torch.manual_seed(0)
    >>> logits, features, target = torch.randn(16, 3), torch.randn(16, 5), torch.randint(0, 3, (16,))
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target, features)
    >>> proxies = selbp.GradientProxies(selbp.ops.residual(logits, target, stats.lse), features)
    >>> selbp.DivBS().select(stats, k=4, proxies=proxies, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    weights: Literal["mean", "batch"] = "mean"

    needs: ClassVar[Needs] = "gradients"

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, ("mean", "batch"))

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Draw k rows, each by what those before do not span."""
        proxies = rows.gradients
        gram, mean = proxies.gram(), proxies.mean_gradient()
        noise = 1e-12 if gram.dtype == torch.float64 else 1e-6  # what rounding leaves of e . g and of |g|^2
        gram, inner = gram.double(), mean.inner.double()
        distance = gram.diagonal().clone()  # |g_j|^2 outside the span of the rows drawn
        spent = noise * (distance.clamp(min=0.0) * mean.target_sq.double()).sqrt()
        dependent = noise * distance
        free = rows.stats.valid.clone()
        columns = gram.new_zeros(k, rows.n)  # of the Cholesky factor, one a draw
        draws: list[Tensor] = []
        gumbel = -torch.log(-torch.log(uniform(k * rows.n, gram, rows.generator).clamp(min=1e-300))).reshape(k, rows.n)
        for step in range(k):
            magnitude = inner.abs()
            # arg max of log odds + Gumbel noise is a draw with those odds; log odds of -1e3 lose to any others.
            odds = torch.where(magnitude > spent, magnitude, 0.0)
            key = torch.where(odds > 0, odds.clamp(min=1e-300).log(), -1e3) + gumbel[step]
            pick = torch.where(free, key, -torch.inf).argmax(0, keepdim=True)
            draws.append(pick)
            free = free.scatter(0, pick, False)
            pivot_sq = distance.gather(0, pick)
            scale = torch.where(pivot_sq > dependent.gather(0, pick), pivot_sq.clamp(min=1e-300).rsqrt(), 0.0)
            column = (gram.index_select(0, pick)[0] - columns[:, pick][:, 0] @ columns) * scale
            columns[step] = column
            inner = inner - (inner.gather(0, pick) * scale) * column
            distance = distance - column.square()
        real = torch.arange(k, device=gram.device) < rows.stats.valid.sum()
        return rows.weighted(torch.cat(draws), real, self.weights)
