"""What the samplers of a table share: epochs, the queue of handed-out batches, exact resume, a rank's shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from selbp._checks import check_entries, check_int, check_shape, reading, shown
from selbp.sampling.issued import Draw, check_ids
from selbp.sampling.table import ScoreTable

_STATE = ("epoch", "consumed", "issued", "plan", "shard")
ODD = 0x2545F4914F6CDD1D  # takes a seed and an epoch to a generator's seed


class TableSampler(Sampler[list[int]]):
    """What the samplers of a table share: epochs, the queue of handed-out batches, exact resume, a rank's shard.

    A subclass says in ``_plan_epoch`` what an epoch is, ``_length`` how many batches it has, and ``_draw`` makes one.

    Parameters
    ----------
    table : ScoreTable
        The scores; its length is the data set's.
    seed : int
        Of every draw, below 2^63; the same on all ranks.
    rank, world_size : int or None
        Each rank owns every ``world_size``-th sample. None: ``torch.distributed``'s where that is initialised, else one
        rank.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.

    See Also
    --------
    selbp.sampling.ScoredBatchSampler : draws by the scores.
    selbp.sampling.info_batch : leaves out a part of the easy samples.

    Examples
    --------
    >>> table = ScoreTable(10, classes=2)
    >>> TableSampler(table, seed=0, rank=1, world_size=3).ids
    tensor([1, 4, 7])
    """

    _planned: tuple[str, ...] = ("order",)  # what every plan of an epoch has

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
        generator = torch.Generator().manual_seed((self.seed + self.epoch * ODD) % (1 << 63))
        return ids[torch.randperm(len(ids), generator=generator, device="cpu").to(ids.device)]

    def __len__(self) -> int:
        return self._length()

    def __iter__(self) -> Iterator[list[int]]:
        """The next epoch, or the rest of the one that a loaded state was in.

        An epoch begins when its first batch is asked for, not when its iterator is made: a loader with workers makes
        two iterators, and asks the second one alone.
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
            self.table.issued.check(token)  # first: what is to be handed out again waits for another iteration
            made = self._replay.popleft() if self._replay else self._draw(index)
            self.table.issued.add(made, token)
            index += 1
            # A list for a loader; a table on a GPU draws for data that is there.
            batch: Any = made.ids.tolist() if made.ids.device.type == "cpu" else made.ids
            yield batch

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
        """Take over a :meth:`state_dict`: the next iteration goes on from there, and one that is running ends.

        Raises ValueError, and changes nothing, where it does not fit this sampler's samples, rank, world size or seed.
        """
        check_entries("state of a sampler", state, _STATE)
        device, samples = self.table.device, self.table.samples
        with reading("state of a sampler"):
            shard = [samples, self.rank, self.world_size, self.seed]
            if list(state["shard"]) != shard:
                raise ValueError(
                    f"the state is of [samples, rank, world_size, seed] = {state['shard']}, here it is {shard}"
                )
            epoch = check_int("the state's epoch", state["epoch"], 0)
            consumed = check_int("the state's consumed", state["consumed"], 0)
            plan = {name: value.to(device, copy=True) for name, value in state["plan"].items()}
            for name in self._planned if plan or consumed else ():
                check_shape(f"the state's plan of {name}", plan[name], "(m,)", (None,))
            issued = [
                Draw(
                    check_ids(d["ids"], len(d["ids"]), samples, device),
                    check_int("the state's uniform", d["uniform"], 0),
                    _moved(d["weights"], device),
                    d["tag"],
                    bool(d["recorded"]),
                )
                for d in state["issued"]
            ]
            for draw in issued:
                if draw.uniform > len(draw.ids) or (draw.weights is not None and draw.weights.shape != draw.ids.shape):
                    raise ValueError(
                        f"a batch in the state's issued has {len(draw.ids)} ids, {draw.uniform} of them uniform, and "
                        f"weights {shown(draw.weights)}"
                    )
        self.epoch, self._consumed, self._plan, self._replay = epoch, consumed, plan, deque(issued)
        self.table.issued.end()
        # Before the first batch of all there is no plan yet; after the last one of an epoch the next epoch is due.
        self._begun = bool(self._plan)
        self._resumed = self._begun and consumed < self._length()


def _moved(x: Tensor | None, device: torch.device) -> Tensor | None:
    return None if x is None else x.to(device)
