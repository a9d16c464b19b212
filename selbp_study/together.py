"""One run by several processes, as torchrun starts them: each reads its part of every minibatch.

The rows that train are chosen among the whole minibatch (``scope="global"``) and the gradients averaged, so that
weights, draws and counts are the same on every process, and those of one process but for the order of sums. So the
state that the first process keeps is the run's: any number of processes goes on from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.journal import Journal
from selbp_study.run import Run
from selbp_study.sampled import SampledOrder
from selbp_study.samples import BatchOrder
from selbp_study.storage import JsonLines, Lock

T = TypeVar("T")


def starts() -> int:
    """How often torchrun has started these processes again, because one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


class Together:
    """The processes of this run, which meet inside ``with``. One that nobody started beside others is alone."""

    def __init__(self, device: str = "cpu") -> None:
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self._cuda = device.startswith("cuda")  # checked where the data is loaded

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which writes and speaks."""
        return self.rank == 0

    def __enter__(self) -> Together:
        if self.size > 1:
            if self._cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            from torch.distributed.rendezvous import rendezvous  # not in every build of torch

            store, rank, size = next(rendezvous("env://"))
            # The agent keeps one store over all restarts: without a prefix of its own, a process that is started again
            # may read where a dead one listened, and wait for it.
            store = distributed.PrefixStore(f"start {starts()}", store)  # type: ignore[attr-defined]
            backend = "cpu:gloo,cuda:nccl" if self._cuda else "gloo"
            distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size > 1 and kind is None:  # else the others may never come to an end of theirs
            distributed.destroy_process_group()

    def share(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns in the first process, in all of them; so what it raises, which is ``told`` there."""
        if self.size == 1:
            return make()
        said: list[Any] = [None, None]
        if self.leads:
            try:
                said[0] = make()
            except Exception as error:
                said[1] = error
                distributed.broadcast_object_list(said)
                raise
        distributed.broadcast_object_list(said)
        if said[1] is not None:
            said[1].told = True
            raise said[1]
        result: T = said[0]
        return result

    def in_turn(self, make: Callable[[], T]) -> T:
        """``make()`` of each process: of the first, and then of the others, which find what it fetched."""
        if self.size == 1:
            return make()
        own: list[T] = []
        self.share(lambda: own.append(make()))
        return own[0] if own else make()


class Part(BatchOrder):
    """The part of each minibatch that one process reads."""

    def __init__(self, whole: BatchOrder, together: Together) -> None:
        super().__init__(whole.n, whole.batch_size, whole.seed)
        self._together = together

    def indices(self, step: int) -> Tensor:
        """Sample numbers of step ``step``: the ranks' parts differ by one sample at most."""
        return super().indices(step).tensor_split(self._together.size)[self._together.rank]


class SharedRun(Run):
    """A run that each of ``together``'s processes carries through on its part of the minibatches."""

    def __init__(self, config: RunConfig, data: Dataset, folder: Path, together: Together) -> None:
        if config.batch_size < together.size:
            raise ValueError(
                f"{together.size} processes share a minibatch of at least as many samples, got "
                f"{config.batch_size}: raise --batch-size"
            )
        super().__init__(config, data, folder)
        if isinstance(self.order, SampledOrder):
            raise ValueError("a rule that draws by a table of scores runs in one process: leave torchrun out")
        self.together, self.order = together, Part(self.order, together)
        self.wrapper = self._wrapper({"scope": "global", "keep": config.kept() / config.batch_size})
        self.stepping = self.wrapper
        self.optimizer.register_step_pre_hook(self._average)
        if not together.leads:
            self.lock, self.log, self.journal = NoLock(folder), NoLog(folder), NoJournal(folder)

    def open(self) -> int:
        """As of one process: the first one finds the state, and all take it."""
        state = self.together.share(self._first)
        if not self.together.leads:
            self.load_state(state)
            self.random = torch.get_rng_state()
        return self.step

    def _first(self) -> dict[str, Any]:
        super().open()
        return self.state()

    def _average(self, *unused: Any) -> None:
        """Average the gradients over the processes, as one tensor whose layout never changes.

        ``DistributedDataParallel`` orders its buckets anew after its first step, and with them the sums: a run that was
        started again would differ in the last place from one that was not.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        whole = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(whole)
        parts = whole.div_(self.together.size).split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _evaluate(self) -> None:
        if self.together.leads:
            super()._evaluate()

    def _finish(self) -> dict[str, Any]:
        return self.together.share(super()._finish)


class NoLock(Lock):
    """Of a process that writes nothing."""

    def acquire(self, wait: bool = False) -> Lock:
        """Nothing to take."""
        return self


class NoLog(JsonLines):
    """Of a process that writes nothing."""

    def append(self, row: Any) -> None:
        """The first process does."""

    def read(self) -> list[dict[str, Any]]:
        """Nothing."""
        return []


class NoJournal(Journal):
    """Of a process that writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, state: Any, step: int) -> None:
        """The first process does."""

    def close(self) -> None:
        """Nothing is open."""
