"""What the samplers of all ranks handed out for one step, so that each rank's table is told of all ranks' samples."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selbp.common.exchange import Ranks
from selbp.sampling.issued import Draw
from selbp.sampling.table import ScoreTable
from selbp.training.scores import write_back


class Drawn(NamedTuple):
    """The samples of one step. Those of several ranks are one after the other."""

    draw: Draw
    order: Tensor | None = None  # (n,) the rows drawn uniformly, then the others; None: they are in that order

    def write(
        self, table: ScoreTable, ranks: Ranks | None, counts: Sequence[int], known: Any, seen: tuple[Any, ...]
    ) -> None:
        """Record what the step saw of them; ``known`` is what the table is told of this rank's own."""
        draw, order = self
        output, losses, place, live = seen
        by_row = isinstance(known, Tensor)
        if by_row and ranks is not None:
            known = ranks.rows(known, counts)
        if order is not None:
            draw, order = draw._replace(ids=draw.ids[order.to(draw.ids.device)]), order.to(losses.device)
            back = torch.empty_like(order)
            back[order] = torch.arange(len(order), device=order.device)
            place, known = back if place is None else back[place], known[order] if by_row else known
        write_back(table, draw, known, output, losses, place, live)


def of_all(draw: Draw, table: ScoreTable, ranks: Ranks, counts: Sequence[int], device: torch.device) -> Drawn:
    """``draw`` of each rank, together. Waits for the device.

    Raises ValueError, on every rank, where they are batches of other kinds, or samplers' that own the same samples.
    """
    if ranks.size == 1:
        return Drawn(draw)
    n, weights = len(draw.ids), draw.weights
    factors = torch.ones(n, dtype=torch.float64, device=draw.ids.device) if weights is None else weights
    rows = torch.stack([draw.ids, factors.view(torch.int64)], 1).to(device)
    tag = zlib.crc32(draw.tag.encode())
    alike = [draw.uniform, weights is not None, draw.recorded, tag, *table.issued.shard(draw)]
    own = torch.cat([rows, torch.tensor([alike], dtype=torch.int64, device=device).expand(n, -1)], 1)
    every = ranks.rows(own, counts).cpu()
    uniform, weighted, recorded, tags, *shards = zip(*(x[0, 2:].tolist() for x in every.split(counts)), strict=True)
    _check_tags(draw, tags, ranks)
    _check_shards(list(zip(*shards, strict=True)))
    ids, factors = (column.contiguous().to(draw.ids.device) for column in every[:, :2].unbind(1))
    together = Draw(ids, sum(uniform), factors.view(torch.float64) if any(weighted) else None, draw.tag, any(recorded))
    starts = [0, *itertools.accumulate(counts)]
    first = [row for start, rows in zip(starts, uniform, strict=False) for row in range(start, start + rows)]
    order = [*first, *sorted(set(range(starts[-1])) - set(first))]
    return Drawn(together, None if order == sorted(order) else torch.tensor(order, device="cpu"))


def _check_tags(draw: Draw, tags: Sequence[int], ranks: Ranks) -> None:
    if len(set(tags)) > 1:
        said = ranks.each_object(draw.tag)
        other = next(rank for rank, text in enumerate(said) if text != said[0])
        raise ValueError(
            f'scope="global" needs batches of one kind on all ranks, got {said[0]!r} on rank 0 and {said[other]!r} on '
            f"rank {other}: give all ranks' loaders as many workers, and call the samplers' use() at the same step"
        )


def _check_shards(shards: list[tuple[int, int]]) -> None:
    """Raise ValueError where two samplers own the same samples."""
    own = [shard for shard in shards if shard[1]]
    if len(set(own)) < len(own) or len({world for _, world in own}) > 1:
        said = ", ".join(f"rank={rank} of world_size={world}" for rank, world in own)
        raise ValueError(
            f'scope="global" needs samplers whose ranks own different samples, got {said}: make the sampler after '
            "torch.distributed.init_process_group(), or pass it rank= and world_size="
        )


def digest(table: ScoreTable) -> Tensor:
    """(1,) int64 that tells apart tables which know something else. Waits for the table's device."""
    found, known = 0, table.state_dict()
    del known["price"]  # says nothing of the samples
    for name, value in sorted(known.items()):
        data = value.contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
        found = zlib.crc32(data, zlib.crc32(name.encode(), found))
    return torch.tensor([found], device="cpu")
