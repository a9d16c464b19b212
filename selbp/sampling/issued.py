"""The batches that a sampler has handed out and no step has trained on yet, in order: how a step knows its samples."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from selbp._checks import shown


class Draw(NamedTuple):
    """One batch of a sampler.

    Attributes
    ----------
    ids : Tensor
        (k,) int64, the samples' numbers.
    uniform : int
        So many of the first rows were drawn without regard to any score.
    weights : Tensor or None
        (k,) float64, a factor on each row's weight in the step; None: 1.
    tag : str
        What :meth:`ScoredBatchSampler.use` called it.
    recorded : bool
        Whether the step writes what it sees of them to the table.

    See Also
    --------
    selbp.sampling.TableSampler : keeps the draws of batches that no step has seen.

    Examples
    --------
    >>> import torch, selbp
    >>> draw = selbp.sampling.ScoreTable(4, classes=2).next(2, torch.tensor([3, 1]))
    >>> draw.ids, draw.uniform
    (tensor([3, 1]), 2)
    """

    ids: Tensor
    uniform: int
    weights: Tensor | None = None
    tag: str = ""
    recorded: bool = True


class Owner(Protocol):
    """The sampler that is iterated over."""

    rank: int
    world_size: int

    def consumed(self) -> None:
        """A batch was trained on."""
        ...


class Issued:
    """A queue of :class:`Draw`, filled by one iteration of one sampler at a time and emptied by the step."""

    def __init__(self) -> None:
        self.draws: deque[Draw] = deque()
        self._owner: Owner | None = None
        self._token: object = None

    def begin(self, owner: Owner) -> object:
        """Forget what an earlier iteration handed out, and return what :meth:`add` asks for."""
        self.draws.clear()
        self._owner, self._token = owner, object()
        return self._token

    def end(self) -> None:
        """Forget what has been handed out, and let the iteration that did hand out no more."""
        self.draws.clear()
        self._token = object()

    @property
    def in_use(self) -> bool:
        """Whether a sampler has been iterated over."""
        return self._owner is not None

    def shard(self, draw: Draw) -> tuple[int, int]:
        """Rank and world size of the sampler that handed out ``draw``; (0, 0) where none did."""
        handed_out = self._owner is not None and any(draw is other for other in self.draws)
        return (self._owner.rank, self._owner.world_size) if self._owner is not None and handed_out else (0, 0)

    def check(self, token: object) -> None:
        """Raise RuntimeError where another iteration has begun since, or a state was loaded."""
        if token is not self._token:
            raise RuntimeError(
                "another iteration over a sampler of this table has begun, or a sampler's state was loaded: a table "
                "serves one at a time. Give each loader that is iterated over at the same time a table of its own, and "
                "begin to iterate anew after load_state_dict"
            )

    def add(self, draw: Draw, token: object) -> None:
        """Hand out ``draw``. Raises RuntimeError as :meth:`check` does."""
        self.check(token)
        self.draws.append(draw)

    def front(self, n: int, ids: Any = None) -> Draw | None:
        """The next batch, which stays, if it is of ``n`` samples, and of ``ids`` where those are given; else None.

        Raises ValueError for another number of samples, RuntimeError where no batch has been handed out, both without
        ``ids`` only.
        """
        first = self.draws[0] if self.draws else None
        if ids is not None:
            return first if first is not None and torch.equal(first.ids, ids) else None
        if first is None:
            raise RuntimeError(
                "which samples are these? No sampler of the step's table has handed out a batch that is not trained on "
                "yet: iterate over a DataLoader(..., batch_sampler=ScoredBatchSampler(table, ...)), or pass ids="
            )
        if len(first.ids) != n:
            raise ValueError(
                f"the batch has {n} samples, but the next one that the table's sampler handed out has "
                f"{len(first.ids)}: give the step the loader's batches as they come and whole, call "
                "sampler.skip() for one that is left out, or pass ids="
            )
        return first

    def done(self, draw: Draw) -> None:
        """``draw`` has been trained on: drop it if it is the next one."""
        if self.draws and self.draws[0] is draw:
            self.draws.popleft()
            if self._owner is not None:
                self._owner.consumed()


def check_ids(ids: Any, n: int, samples: int, device: torch.device) -> Tensor:
    """``ids`` as (n,) int64 on ``device``. Raises TypeError or ValueError; values are looked at on a CPU only."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be an int64 tensor (n,) of sample numbers, got {shown(ids)}")
    if ids.shape != (n,):
        raise ValueError(f"ids must be (n,) = ({n},), one number a sample, got {tuple(ids.shape)}")
    if ids.device.type == "cpu" and n and not (0 <= int(ids.min()) and int(ids.max()) < samples):
        raise ValueError(f"ids must lie in [0, {samples}), got {int(ids.min())} to {int(ids.max())}")
    # A CPU reads them at once: a copy to it must have landed.
    return ids.to(device=device, dtype=torch.int64, non_blocking=device.type != "cpu").contiguous()
