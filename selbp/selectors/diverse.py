"""Diversified draws: rows that together span the mean gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from selbp._checks import check_choice
from selbp.ops.choose_gradients import choose_diverse
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

    Raises
    ------
    ValueError
        For other ``weights``.

    See Also
    --------
    selbp.GradientMatching : the same pursuit without chance, and with weights.

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
        stats = rows.stats
        draws = uniform(k * rows.n, gram, rows.generator).view(k, rows.n)
        single = stats.loss.dtype == torch.float32
        indices, weights = choose_diverse(gram, mean.inner, mean.target_sq, stats.valid, draws, k, self.weights, single)
        return Selection(indices, weights.to(stats.loss.dtype))
