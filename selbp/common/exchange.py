"""The samples of all ranks as one minibatch: what each rank tells the others, and which rows change place.

A sample's number is its row in the minibatches of all ranks, put one after the other in the order of the ranks.
"""

from __future__ import annotations

import bisect
import io
import itertools
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from selbp._numpy import ARRAYS
from selbp.common.batch import Batch
from selbp.common.distributed import parallel_in
from selbp.common.lengths import Lengths
from selbp.common.samples import listed, take_entries, take_rows


class Ranks:
    """The processes among which ``model``'s gradients are averaged: its wrapper's group, else torch's default one.

    The group is looked up at each call: a step may be built before the processes meet. Where there are no others, one
    process is all ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @property
    def group(self) -> Any:
        """The process group; None for torch's default one."""
        parallel = parallel_in(self._model)
        return None if parallel is None else parallel.process_group

    @property
    def size(self) -> int:
        """How many processes there are."""
        alone = not distributed.is_available() or not distributed.is_initialized()
        return 1 if alone else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        return 0 if self.size == 1 else distributed.get_rank(self.group)

    def each(self, x: Tensor) -> list[Tensor]:
        """``x`` of every rank; all have its shape and dtype."""
        if self.size == 1:
            return [x]
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        distributed.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def average(self, x: Tensor) -> Tensor:
        """``x`` averaged over the ranks, in place."""
        if self.size == 1:
            return x
        x = x.contiguous()
        distributed.all_reduce(x, group=self.group)
        return x.div_(self.size)

    def rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum of counts, ...) ``x`` (n, ...) of every rank, one after the other; ``counts`` are their n."""
        most = max(counts)
        padded = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) if len(x) < most else x
        return torch.cat([part[:n] for part, n in zip(self.each(padded), counts, strict=True)])

    def meet(self, batch: Batch, lengths: Lengths) -> tuple[Batch, list[int]]:
        """The batch, its sequences as long as the longest of all ranks, and how many samples each rank has.

        Waits for the device.

        Raises:
            ValueError: on every rank, where the batches differ in anything but the number of samples and the length of
                sequences that can be padded.
        """
        length, sequences = lengths.of(batch)
        described = _description(batch, sequences)
        header = torch.tensor([batch.n, length, zlib.crc32(described.encode())], device=batch.device)
        counts, every, digests = zip(*(part.tolist() for part in self.each(header)), strict=True)
        if len(set(digests)) > 1:
            said = self.each_object(described)
            other = next(i for i, text in enumerate(said) if text != said[0])
            raise ValueError(
                'scope="global" trains rows on other ranks than they came to: the minibatches must have equal entries, '
                "types and shapes but for the number of samples, and the length of sequences with an attention mask or "
                f"labels of next tokens (pad others to one length), got {said[0]} on rank 0 and {said[other]} on rank "
                f"{other}"
            )
        return lengths.padded(batch, max(every)), list(counts)

    def each_object(self, x: Any) -> list[Any]:
        """Any object of every rank; it goes by way of the model's device, not by that which the process is set to."""
        packed = _pack(x).to(self._device)
        counts = [int(n) for n in self.each(torch.tensor([len(packed)], device=self._device))]
        return [_unpack(part, self._device) for part in self.rows(packed, counts).split(counts)]

    def first(self, x: Any) -> Any:
        """Rank 0's object."""
        said = [x]
        if self.size > 1:
            group = self.group
            source = 0 if group is None else distributed.get_global_rank(group, 0)
            distributed.broadcast_object_list(said, source, group=group, device=self._device)
        return said[0]

    def mean(self, numbers: Sequence[float]) -> list[float]:
        """The means over ranks of as many numbers of each, the same on all; NaN where one of them has NaN."""
        if self.size == 1:
            return list(numbers)
        parts = self.each(torch.tensor(numbers, dtype=torch.float64, device=self._device))
        return torch.stack(parts).mean(0).tolist()

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self._model.parameters()), torch.device("cpu"))

    def agree(self, x: Tensor, device: torch.device, what: str, remedy: str) -> None:
        """Raise ValueError, on every rank, unless all have the same ``x``. Waits for the device."""
        digest = torch.tensor([zlib.crc32(x.detach().cpu().numpy().tobytes())], device=device)
        if len({int(part) for part in self.each(digest)}) > 1:
            raise ValueError(f'scope="global" needs {what} on every rank: {remedy}')

    def exchange(self, batch: Batch, plan: Plan, counts: Sequence[int]) -> Batch | None:
        """The samples that ``plan`` has this rank train, in the order of ``plan.slots``; None where there is none."""
        me, first = self.rank, sum(counts[: self.rank])
        to = [plan.moving(me, other) for other in range(self.size)]
        sizes = [len(plan.moving(other, me)) for other in range(self.size)]
        kept = _index([row - first for row in plan.between(me, me)], batch.device)
        leaving = _index([row - first for rows in to for row in rows], batch.device)

        def swap(x: Tensor) -> Tensor:
            stay = take_rows(x, kept)
            if not plan.moves:
                return stay
            out = _bytes(take_rows(x, leaving))
            into = out.new_empty(sum(sizes), out.shape[1])
            distributed.all_to_all_single(into, out, sizes, [len(rows) for rows in to], group=self.group)
            shape = (len(into), *x.shape[1:])
            arrived = into.flatten().view(x.dtype).view(shape)
            return torch.cat([stay, arrived]).contiguous(memory_format=_format(x))

        def swap_entries(entries: Any) -> Any:
            def some(rows: Sequence[int]) -> list[Any]:
                return list(take_entries(entries, [row - first for row in rows], [True] * len(rows)))

            stay = some(plan.between(me, me))
            if not plan.moves:
                return _like(entries, stay)
            parcels = self._deliver([some(rows) for rows in to], batch.device)
            return _like(entries, stay + [entry for parcel in parcels for entry in parcel])

        mine = batch.mapped(len(kept) + sum(sizes), swap, swap_entries)
        return mine if mine.n else None

    def _deliver(self, parcels: Sequence[Any], device: torch.device) -> list[Any]:
        """Send ``parcels[r]`` to each rank r, and return what each rank sent to this one."""
        packed = [_pack(parcel) for parcel in parcels]
        leaving = torch.tensor([len(x) for x in packed], device=device)
        arriving = torch.empty_like(leaving)
        distributed.all_to_all_single(arriving, leaving, group=self.group)
        out, into = leaving.tolist(), arriving.tolist()
        received = torch.empty(sum(into), dtype=torch.uint8, device=device)
        distributed.all_to_all_single(received, torch.cat(packed).to(device), into, out, group=self.group)
        return [_unpack(part, device) for part in received.split(into)]


class Plan(NamedTuple):
    """Which rank trains which of the chosen rows."""

    rows: list[int]  # (K,) sample numbers
    ways: dict[tuple[int, int], list[int]]  # (rank of origin, rank that trains) -> which of the K chosen rows

    @classmethod
    def of(cls, rows: Sequence[int], counts: Sequence[int], quotas: Sequence[int]) -> Plan:
        """Rank r trains ``quotas[r]`` of the chosen ``rows``: its own first, the others to ranks that have fewer."""
        ends = list(itertools.accumulate(counts))
        free, ways = list(quotas), defaultdict(list)
        leaving = []
        for slot, row in enumerate(rows):
            came = bisect.bisect_right(ends, row)
            if free[came]:
                free[came] -= 1
                ways[came, came].append(slot)
            else:
                leaving.append((came, slot))
        spare = (rank for rank, left in enumerate(free) for _ in range(left))
        for (came, slot), goes in zip(leaving, spare, strict=True):
            ways[came, goes].append(slot)
        return cls(list(rows), dict(ways))

    @property
    def moves(self) -> bool:
        """Whether any row changes place."""
        return any(came != goes for came, goes in self.ways)

    def slots(self, rank: int, ranks: int) -> list[int]:
        """Which of the chosen rows ``rank`` trains: those that came to it, then the others by the rank of origin."""
        others = (self.ways.get((came, rank), []) for came in range(ranks) if came != rank)
        return [*self.ways.get((rank, rank), []), *itertools.chain.from_iterable(others)]

    def moving(self, came: int, goes: int) -> list[int]:
        """The sample numbers that rank ``came`` sends to ``goes``."""
        return [] if came == goes else self.between(came, goes)

    def between(self, came: int, goes: int) -> list[int]:
        """The sample numbers that came to one rank and are trained on the other."""
        return [self.rows[slot] for slot in self.ways.get((came, goes), [])]


def _description(batch: Batch, sequences: Sequence[Tensor]) -> str:
    """The entries of a batch, their dtypes and the shape of one sample, T for the length of ``sequences``."""
    found: list[str] = []
    ragged = {id(x) for x in sequences}

    def note(x: Tensor) -> Tensor:
        sizes = list(map(str, x.shape[1:]))
        if id(x) in ragged:
            sizes[0] = "T"
        found.append(f"{str(x.dtype).removeprefix('torch.')} (n, {', '.join(sizes)})")
        return x

    def entries(samples: Any) -> Any:
        found.append(f"a {type(samples).__name__} of n")
        return samples

    batch.mapped(batch.n, note, entries)
    names = f" {sorted(map(str, batch.inputs))}" if isinstance(batch.inputs, Mapping) else ""
    known = "".join(f", {name}: {x.dtype}" for name, x in sorted(batch.extras.items()))
    return f"{type(batch.inputs).__name__}{names} and target: {', '.join(found)}{known}"


def _pack(parcel: Any) -> Tensor:
    file = io.BytesIO()
    torch.save(parcel, file)
    return torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)


def _unpack(data: Tensor, device: torch.device) -> Any:
    """Undo :func:`_pack` of another process of this program; tensors that were on its device come to ``device``."""

    def place(storage: Any, tag: str) -> Any:
        return storage if tag == "cpu" else storage.to(device=device)

    file = io.BytesIO(data.cpu().numpy().tobytes())
    return torch.load(file, map_location=place, weights_only=False)


def _like(entries: Any, made: list[Any]) -> Any:
    """``made`` as a sequence of the kind of ``entries``."""
    if isinstance(entries, ARRAYS):
        import numpy  # whose array it is

        return numpy.stack(made) if made else entries[:0]
    return listed(tuple(made) if isinstance(entries, tuple) else made)


def _index(rows: list[int], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=device)


def _bytes(x: Tensor) -> Tensor:
    """(rows, bytes) of ``x`` (rows, ...): whatever its dtype, every backend moves bytes."""
    width = x.shape[1:].numel() * x.element_size()
    return x.detach().contiguous().flatten().view(torch.uint8).view(len(x), width)


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
