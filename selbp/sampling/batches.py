"""Batch samplers that draw by a table of scores, before anything is read or run."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selbp._checks import check_choice, check_int, check_number
from selbp.sampling.draw import Odds, draw
from selbp.sampling.issued import Draw
from selbp.sampling.table import ScoreTable
from selbp.sampling.table_sampler import ODD, TableSampler


class ScoredBatchSampler(TableSampler):
    """Batches of k samples, drawn from a uniform pool by the odds that a table gives: hard *and* probably right.

    ::

        loader = DataLoader(dataset, batch_sampler=ScoredBatchSampler(table), num_workers=4)
        step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, table=table, ...)
        for inputs, target in loader:
            step(inputs, target).backward()

    An epoch is a random permutation of the data set, cut into pools of ``pool`` samples or one or a few more, so that
    every sample is in exactly one; of each pool k are drawn before anything is read or run. The odds are
    ``r (1 - p)^power + floor * mean`` (Gumbel top-k, never the top ones, which are the surest or the wrongly labelled).
    A share ``uniform`` of the rows is drawn without regard to them: those feed the estimates of noise and headroom.

    The data set needs no wrapper: the step takes the samples' numbers from the sampler's own order. Workers fetch
    ahead, so scores are ``num_workers * prefetch_factor`` steps old when they are used. The loader must keep its order
    (``in_order=True``, the default).

    Parameters
    ----------
    table : ScoreTable
        The scores; its length is the data set's.
    k : int
        Rows of a batch.
    pool : int
        Samples that a batch is drawn from, at least k; all there are where they are fewer. :func:`selbp.auto_select`
        asks for 256.
    power : float
        Of the hardness 1 - p, at least 0; 0 draws by responsibility alone.
    floor : float
        Added to all odds, relative to their mean. Above 0 for ``weights="unbiased"``.
    uniform : float
        Share of the rows in [0, 1], on average.
    weights : {"mean", "unbiased"}
        ``"mean"``: the step averages over the rows as they come. ``"unbiased"``: it weights them so that the
        expectation is the pool's mean (see ``selbp.sampling.draw``).
    seed : int
        Of every draw; the same on all ranks.
    rank, world_size : int or None
        Each rank owns every ``world_size``-th sample and has scores of those alone, unless the step has
        ``scope="global"``; from ``torch.distributed`` where that is initialised. All ranks have the same number of
        batches.

    Raises
    ------
    TypeError, ValueError
        At construction, for arguments of the wrong type or out of range.

    See Also
    --------
    selbp.sampling.ScoreTable : what it draws by.
    selbp.auto_select : makes table, sampler and step in one call.

    Examples
    --------
    >>> sampler = ScoredBatchSampler(ScoreTable(1000, classes=10), k=16, pool=100)
    >>> len(sampler), len(next(iter(sampler)))
    (10, 16)
    """

    def __init__(
        self,
        table: ScoreTable,
        k: int = 48,
        pool: int = 128,
        *,
        power: float = 0.5,
        floor: float = 0.1,
        uniform: float = 0.05,
        weights: Literal["mean", "unbiased"] = "mean",
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(table, seed, rank, world_size)
        self.k = check_int("k", k, 1)
        self.pool = check_int("pool", pool, 1)
        if self.pool < self.k:
            raise ValueError(f"pool must be at least k = {self.k}, got {self.pool}")
        self.odds = Odds(check_number("power", power, 0.0), check_number("floor", floor, 0.0))
        self.uniform = check_number("uniform", uniform, 0.0, 1.0)
        check_choice("weights", weights, ("mean", "unbiased"))
        if weights == "unbiased" and self.odds.floor == 0.0:
            raise ValueError("floor must be above 0 for weights='unbiased': else a sample may have no chance, got 0")
        if table.samples // self.world_size < self.k:
            raise ValueError(f"k must be at most a rank's {table.samples // self.world_size} samples, got {self.k}")
        self.weights = weights
        self._scored, self._rows, self._tag, self._every = True, self.k, "", 1
        self._sweep = -1, torch.empty(0, dtype=torch.int64, device="cpu")  # its number and its permutation

    def __repr__(self) -> str:
        at = f"epoch={self.epoch}, consumed={self._consumed}"
        return f"{type(self).__name__}({self.table!r}, k={self.k}, pool={self.pool}, {at})"

    def use(self, *, k: int | None = None, scored: bool = True, tag: str = "", record_every: int = 1) -> None:
        """From the next draw on: rows of a batch (None: as constructed), whether by the odds or uniformly, and a name.

        The name is handed to the step with each batch. Of ``record_every`` batches the step writes what it saw of one
        to the table. Raises ValueError for a k above the pool.
        """
        every = check_int("record_every", record_every, 1)
        rows = self.k if k is None else check_int("k", k, 1)
        if rows > min(self.pool, self.table.samples // self.world_size):
            raise ValueError(f"k must be at most the pool's {self.pool} samples, got {rows}")
        self._scored, self._rows, self._tag, self._every = scored, rows, tag, every

    def _before_epoch(self) -> None:
        if self._scored:  # else nothing is drawn by a score
            self.table.refresh()

    def _length(self) -> int:
        return max(1, self.table.samples // self.world_size // self.pool)

    def _plan_epoch(self) -> dict[str, Tensor]:
        plan = {"order": self._shuffled(self.ids)}
        factor = self.table.class_factor(self.odds)
        return plan if factor is None else {**plan, "factor": factor}

    def _next_of_sweep(self, step: int, k: int) -> Tensor:
        """(k,) the samples of random step ``step``: from one permutation after another, as a shuffling loader has them.

        A sample then comes back only when all others had their turn, which k of each pool would not grant.
        """
        sweep, place = divmod(step, (self.table.samples // self.world_size) // k)
        if self._sweep[0] != sweep:
            generator = torch.Generator().manual_seed((self.seed + ~sweep * ODD) % (1 << 63))
            ids = self.ids
            self._sweep = sweep, ids[torch.randperm(len(ids), generator=generator, device="cpu").to(ids.device)]
        return self._sweep[1][place * k : (place + 1) * k]

    def _draw(self, index: int) -> Draw:
        order, batches = self._plan["order"], self._length()
        step = self.epoch * batches + index
        k, share = self._rows, self.uniform * self._rows
        recorded, unbiased = step % self._every == 0, self.weights == "unbiased"
        if not self._scored:
            weights = torch.ones(k, dtype=torch.float64, device=order.device) if unbiased else None
            return Draw(self._next_of_sweep(step, k), k, weights, self._tag, recorded)
        pool = order[index * len(order) // batches : (index + 1) * len(order) // batches]
        uniform = int((step + 1) * share) - int(step * share)
        self.table.arrive(wait=False)
        place, weights = draw(
            self.table._columns, pool, k, uniform, self.odds, self._plan.get("factor"), self.seed, step, unbiased
        )
        return Draw(pool[place], uniform, None if weights is None else weights.mul_(k), self._tag, recorded)
