"""Batch samplers that draw by a table of scores, before anything is read or run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Sampler

from selbp._checks import check_choice, check_int, check_number, shown
from selbp.sampling.draw import Odds, draw
from selbp.sampling.issued import Draw
from selbp.sampling.table import ScoreTable

_STATE = ("epoch", "consumed", "issued", "plan", "shard")
_ODD = 0x2545F4914F6CDD1D  # takes a seed and an epoch to a generator's seed


class TableSampler(Sampler[list[int]]):
    """What the samplers of a table share: epochs, the queue of handed-out batches, exact resume, a rank's shard.

    A subclass says in ``_plan_epoch`` what an epoch is, ``_length`` how many batches it has, and ``_draw`` makes one.
    """

    def __init__(self, table: ScoreTable, seed: int, rank: int | None, world_size: int | None) -> None:
        if not isinstance(table, ScoreTable):
            raise TypeError(f"table must be a selbp.sampling.ScoreTable, got {shown(table)}")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank and world_size go together, got rank={rank} and world_size={world_size}")
        if rank is None or world_size is None:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if ready else 0
            world_size = torch.distributed.get_world_size() if ready else 1
        self.world_size, self.rank = check_int("world_size", world_size, 1), check_int("rank", rank, 0)
        if self.rank >= self.world_size:
            raise ValueError(f"rank must be below world_size = {self.world_size}, got {self.rank}")
        if table.samples < self.world_size:
            raise ValueError(f"world_size must be at most the table's {table.samples} samples, got {self.world_size}")
        self.table, self.seed = table, check_int("seed", seed, 0)
        if self.seed >= 1 << 63:
            raise ValueError(f"seed must be below 2^63, got {seed}")
        self.epoch = 0
        self._consumed = 0
        self._replay: deque[Draw] = deque()
        self._plan: dict[str, Tensor] = {}
        self._begun = self._resumed = False

    @property
    def ids(self) -> Tensor:
        """(n,) int64 the samples that this rank owns: every ``world_size``-th one from ``rank``."""
        return torch.arange(self.rank, self.table.samples, self.world_size, device=self.table.device)

    def _plan_epoch(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def _before_epoch(self) -> None:
        self.table.refresh()

    def _length(self) -> int:
        raise NotImplementedError

    def _draw(self, index: int) -> Draw:
        raise NotImplementedError

    def _shuffled(self, ids: Tensor) -> Tensor:
        """``ids`` in this epoch's random order, which follows from the seed, the epoch and the rank."""
        generator = torch.Generator().manual_seed((self.seed + self.epoch * _ODD) % (1 << 63))
        return ids[torch.randperm(len(ids), generator=generator).to(ids.device)]

    def __len__(self) -> int:
        return self._length()

    def __iter__(self) -> Iterator[list[int]]:
        """The next epoch, or the rest of the one that a loaded state was in.

        It begins with its first batch: a loader with workers makes two iterators, and uses the second.
        """
        if not self._resumed:
            self.epoch += self._begun
            self._consumed = 0
            self._replay.clear()
            self._before_epoch()
            self._plan = self._plan_epoch()
        self._begun, self._resumed = True, False
        token, index = self.table.issued.begin(self), self._consumed
        while index < self._length():
            made = self._replay.popleft() if self._replay else self._draw(index)
            self.table.issued.add(made, token)
            index += 1
            # A list for a loader; a table on a GPU draws for data that is there.
            yield made.ids.tolist() if made.ids.device.type == "cpu" else made.ids  # type: ignore[misc]

    def consumed(self) -> None:
        """A batch was trained on: the step says so."""
        self._consumed += 1

    def skip(self) -> Draw:
        """Count the next batch that was handed out as trained on, and return it.

        For a batch that is left out, and for loops that do without :class:`selbp.SelectiveBackprop`.
        """
        if not self.table.issued.draws:
            raise RuntimeError("the sampler has handed out no batch that is not trained on yet")
        first = self.table.issued.draws[0]
        self.table.issued.done(first)
        return first

    def state_dict(self) -> dict[str, Any]:
        """Where the training is: batches that workers fetched and no step has seen are kept as they were drawn.

        Beside it go the states of table, step, model and optimizer. A run that is resumed with as many workers of the
        same ``prefetch_factor`` draws what the other would have drawn.
        """
        waiting = [*self.table.issued.draws, *self._replay] if self._begun else list(self._replay)
        issued = [
            {
                "ids": d.ids.cpu().clone(),
                "uniform": d.uniform,
                "tag": d.tag,
                "recorded": d.recorded,
                "weights": None if d.weights is None else d.weights.cpu().clone(),
            }
            for d in waiting
        ]
        plan = {name: value.cpu().clone() for name, value in self._plan.items()}
        shard = [self.table.samples, self.rank, self.world_size, self.seed]
        return {"epoch": self.epoch, "consumed": self._consumed, "issued": issued, "plan": plan, "shard": shard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`: the next iteration goes on from there.

        Raises ValueError, and changes nothing, where it does not fit this sampler's samples, rank, world size or seed.
        """
        if not isinstance(state, Mapping) or set(state) != set(_STATE):
            got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state of a sampler must have the entries {sorted(_STATE)}, got {got}")
        shard = [self.table.samples, self.rank, self.world_size, self.seed]
        if list(state["shard"]) != shard:
            raise ValueError(
                f"the state is of [samples, rank, world_size, seed] = {state['shard']}, here it is {shard}"
            )
        epoch, consumed = check_int("the state's epoch", state["epoch"], 0), check_int("consumed", state["consumed"], 0)
        device = self.table.device
        issued = [
            Draw(d["ids"].to(device), int(d["uniform"]), _moved(d["weights"], device), d["tag"], bool(d["recorded"]))
            for d in state["issued"]
        ]
        self.epoch, self._consumed = epoch, consumed
        self._plan = {name: value.to(device, copy=True) for name, value in state["plan"].items()}
        self._replay = deque(issued)
        self.table.issued.draws.clear()
        # Before the first batch of all there is no plan yet; after the last one of an epoch the next epoch is due.
        self._begun = bool(self._plan)
        self._resumed = self._begun and consumed < self._length()


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)


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
        Samples that a batch is drawn from, at least k; all there are where they are fewer.
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
        Each rank owns every ``world_size``-th sample and has scores of those alone; from ``torch.distributed`` where
        that is initialised. All ranks have the same number of batches.

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
        self._sweep = -1, torch.empty(0, dtype=torch.int64)  # its number and its permutation

    def use(self, *, k: int | None = None, scored: bool = True, tag: str = "", record_every: int = 1) -> None:
        """From the next draw on: rows of a batch (None: as constructed), whether by the odds or uniformly, and a name.

        The name is handed to the step with each batch. Of ``record_every`` batches the step writes what it saw of one
        to the table. Raises ValueError for a k above the pool.
        """
        self._every = check_int("record_every", record_every, 1)
        rows = self.k if k is None else check_int("k", k, 1)
        if rows > min(self.pool, self.table.samples // self.world_size):
            raise ValueError(f"k must be at most the pool's {self.pool} samples, got {rows}")
        self._scored, self._rows, self._tag = scored, rows, tag

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
            generator = torch.Generator().manual_seed((self.seed + ~sweep * _ODD) % (1 << 63))
            ids = self.ids
            self._sweep = sweep, ids[torch.randperm(len(ids), generator=generator).to(ids.device)]
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
