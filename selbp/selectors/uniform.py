"""The two baselines: every row, and rows drawn uniformly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from selbp.reference.sampling import uniform
from selbp.selectors.base import BaseSelector, Needs
from selbp.selectors.candidates import Candidates
from selbp.types import Selection


@dataclass(frozen=True)
class Full(BaseSelector):
    """Every row with weight 1 / n, whatever k: the ordinary step.

    Rows that are not valid keep their place with weight 0, so that the forward sees the minibatch as it came.

    See Also
    --------
    selbp.Random : k rows drawn uniformly; the forward runs on those only.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.Full().select(stats, k=2)
    Selection(indices=tensor([0, 1, 2, 3]), weights=tensor([0.2500, 0.2500, 0.2500, 0.2500]))
    """

    needs: ClassVar[Needs] = "nothing"

    def choose(self, rows: Candidates, k: int) -> Selection:
        """All n rows."""
        n, valid = rows.n, rows.stats.valid
        return Selection(torch.arange(n, device=valid.device), valid.to(rows.stats.loss.dtype) / n)


@dataclass(frozen=True)
class Random(BaseSelector):
    """k valid rows without replacement, each with the same chance; weights 1 / k.

    Of v < n valid rows min(k, v) are drawn, with weight v / (n min(k, v)): unbiased for (1/n) sum_valid g_i.

    See Also
    --------
    selbp.GradNormImportance : unbiased as well, with odds by the gradient's norm.
    selbp.CubeSampling : unbiased as well; balances the sample on the gradients.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.Random().select(stats, k=2, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.5000, 0.5000])
    """

    needs: ClassVar[Needs] = "nothing"

    def choose(self, rows: Candidates, k: int) -> Selection:
        """The k valid rows of greatest random numbers."""
        return rows.pick(uniform(rows.n, rows.stats.valid, rows.generator), k)
