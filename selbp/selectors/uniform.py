"""The two baselines: every row, and rows drawn uniformly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from selbp.ops.choose_rows import choose_rows
from selbp.reference.sampling import uniform
from selbp.selectors.base import Needs, Stateless, check_select
from selbp.selectors.proxies import GradientProxies
from selbp.types import BatchStatistics, Selection


@dataclass(frozen=True)
class Full(Stateless):
    """Every row with weight 1 / n, whatever k: the ordinary step.

    Rows that are not valid keep their place with weight 0, so that the forward sees the minibatch as it came.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.Full().select(stats, k=2)
    Selection(indices=tensor([0, 1, 2, 3]), weights=tensor([0.2500, 0.2500, 0.2500, 0.2500]))
    """

    needs: ClassVar[Needs] = "nothing"

    @torch.no_grad()
    def select(
        self,
        stats: BatchStatistics,
        k: int,
        *,
        proxies: GradientProxies | None = None,
        extras: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """See :meth:`Selector.select`; returns all n rows."""
        n, _ = check_select(stats, k, generator)
        return Selection(torch.arange(n, device=stats.valid.device), stats.valid.to(stats.loss.dtype) / n)


@dataclass(frozen=True)
class Random(Stateless):
    """k valid rows without replacement, each with the same chance; weights 1 / k.

    Of v < n valid rows min(k, v) are drawn, with weight v / (n min(k, v)): unbiased for (1/n) sum_valid g_i.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.Random().select(stats, k=2, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.5000, 0.5000])
    """

    needs: ClassVar[Needs] = "nothing"

    @torch.no_grad()
    def select(
        self,
        stats: BatchStatistics,
        k: int,
        *,
        proxies: GradientProxies | None = None,
        extras: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """See :meth:`Selector.select`."""
        n, k = check_select(stats, k, generator)
        key = uniform(n, stats.valid, generator)
        return choose_rows(key, stats.valid, k, rule="top", weights="mean", dtype=stats.loss.dtype)
