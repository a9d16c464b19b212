"""Published rules on the same table of scores, to compare with: InfoBatch and RHO-LOSS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp._checks import check_int, check_number, shown
from selbp.sampling.batches import ScoredBatchSampler
from selbp.sampling.draw import uniform
from selbp.sampling.issued import Draw
from selbp.sampling.proxy import Proxy
from selbp.sampling.table import ScoreTable
from selbp.sampling.table_sampler import TableSampler
from selbp.selectors import ReducibleLoss


class InfoBatchSampler(TableSampler):
    """Epochs that leave out a part of the easy samples. Those easy samples that stay are weighted for both.

    Parameters
    ----------
    table, k, ratio, epochs, anneal, seed
        As of :func:`info_batch`, which makes one.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range; several ranks.

    See Also
    --------
    selbp.sampling.info_batch : makes one with its table.

    Examples
    --------
    >>> import torch
    >>> table = ScoreTable(8, classes=2)
    >>> table.fill(torch.arange(8), torch.tensor([[4.0, 0.0]]).repeat(8, 1), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]))
    >>> sampler = InfoBatchSampler(table, k=4, ratio=0.5, epochs=2, anneal=0.5, seed=0)
    >>> [len(batch) for batch in sampler], [len(batch) for batch in sampler]  # the second epoch leaves out nothing
    ([4, 2], [4, 4])
    """

    _planned = ("order", "weight")

    def __init__(self, table: ScoreTable, k: int, ratio: float, epochs: int, anneal: float, seed: int) -> None:
        super().__init__(table, seed, None, None)
        if self.world_size > 1:
            raise ValueError(
                f"info_batch is for one rank, got {self.world_size}: ranks would leave out different numbers of samples"
            )
        self.k, self.epochs = check_int("k", k, 1), check_int("epochs", epochs, 1)
        self.ratio = check_number("ratio", ratio, 0.0, 1.0)
        if self.ratio == 1.0:
            raise ValueError("ratio must be below 1, got 1: the samples that are kept count for the others")
        self.anneal = check_number("anneal", anneal, 0.0, 1.0)

    def _plan_epoch(self) -> dict[str, Tensor]:
        ids = self.ids
        weight = torch.ones(len(ids), dtype=torch.float64, device=ids.device)
        keep = torch.ones_like(ids, dtype=torch.bool)
        if self.epoch < self.anneal * self.epochs:
            loss = -self.table.probability.double().log()
            known = torch.isfinite(loss)
            easy = known & (loss < torch.where(known, loss, 0.0).sum() / known.sum().clamp(min=1))
            keep = ~(easy & (uniform(self.seed, self.epoch, 2, ids) < self.ratio))
            weight = torch.where(easy, weight / (1.0 - self.ratio), weight)
        order = self._shuffled(ids[keep])
        return {"order": order, "weight": weight[order]}

    def _length(self) -> int:
        return -(-len(self._plan["order"] if self._plan else self.ids) // self.k)

    def _draw(self, index: int) -> Draw:
        part = slice(index * self.k, (index + 1) * self.k)
        ids, weight = self._plan["order"][part], self._plan["weight"][part]
        return Draw(ids, len(ids) if len(self._plan["order"]) == self.table.samples else 0, weight)


def info_batch(
    table: ScoreTable, k: int = 128, *, epochs: int, ratio: float = 0.5, anneal: float = 0.875, seed: int = 0
) -> InfoBatchSampler:
    """InfoBatch (Qin et al. 2024): each epoch leaves out a share ``ratio`` of the samples below the mean loss.

    A sample below the mean that stays is weighted by 1 / (1 - ratio). So an epoch's expected gradient is that of the
    whole data set. The last ``1 - anneal`` of the ``epochs`` leave nothing out. A sample's loss is the one that it had
    when it was last trained on.

    Parameters
    ----------
    table : ScoreTable
        Whose p tell the losses, -log p; a step with ``table=`` writes them.
    k : int
        Rows of a batch; an epoch's last one may have fewer.
    epochs : int
        Of the whole training.
    ratio : float
        Share of the samples below the mean that is left out, in [0, 1).
    anneal : float
        Share of the epochs that leave samples out.
    seed : int
        Of every draw.

    Returns
    -------
    InfoBatchSampler
        A batch sampler: ``DataLoader(dataset, batch_sampler=...)``, with ``selector=selbp.Full()``. Its length is that
        of the epoch it is in.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range; several ranks.

    See Also
    --------
    selbp.sampling.rho_loss : another published rule on a table.

    Examples
    --------
    >>> len(info_batch(ScoreTable(1000, classes=10), k=100, epochs=8))
    10
    """
    return InfoBatchSampler(table, k, ratio, epochs, anneal, seed)


def rho_loss(
    table: ScoreTable, proxy: Proxy, k: int = 32, pool: int = 320, *, seed: int = 0
) -> tuple[ScoredBatchSampler, dict[str, Any]]:
    """RHO-LOSS (Mindermann et al. 2022) with the proxy as the irreducible model: train on the greatest loss - proxy's.

    The source trains the irreducible model on held-out data; ``fit_proxy(..., halves=True)`` scores each sample by a
    proxy that has not seen it.

    Parameters
    ----------
    table : ScoreTable
        It keeps the irreducible losses, and the step hands them to the rule.
    proxy : Proxy
        What :func:`fit_proxy` returned.
    k : int
        Rows that are trained on.
    pool : int
        Rows that run forward.
    seed : int
        Of every draw.

    Returns
    -------
    sampler, arguments : tuple of ScoredBatchSampler and dict
        A sampler of ``pool`` uniform samples a batch, and arguments of :class:`selbp.SelectiveBackprop`, which then
        runs all of them forward and the k of greatest reducible loss backward::

            sampler, arguments = selbp.sampling.rho_loss(table, proxy)
            step = selbp.SelectiveBackprop(model, **arguments)

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type, or the proxy is of another number of samples.

    See Also
    --------
    selbp.ReducibleLoss : the rule without a table.

    Examples
    --------
    >>> table = ScoreTable(4, classes=2)
    >>> proxy = Proxy(0.0, 0.0, 1.0, 1.0, torch.zeros(4))
    >>> rho_loss(table, proxy, k=1, pool=2)[1]["keep"]
    1
    """
    if not isinstance(proxy, Proxy):
        raise TypeError(f"proxy must be what fit_proxy returned, got {shown(proxy)}")
    sampler = ScoredBatchSampler(table, pool, pool, uniform=1.0, seed=seed)
    if proxy.losses.shape != (table.samples,):
        raise ValueError(f"the proxy must be of the table's {table.samples} samples, got {tuple(proxy.losses.shape)}")
    table.irreducible = proxy.losses.to(table.device)
    return sampler, {"selector": ReducibleLoss(), "keep": check_int("k", k, 1), "table": table}
