"""What the steps of a training write to a table: of each row that trained, what its sample is now known by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp._checks import shown
from selbp.sampling.issued import Draw
from selbp.sampling.known import KnownScores
from selbp.sampling.noise import normalised
from selbp.sampling.record import Fresh, record, remember


class WrittenScores(KnownScores):
    """A :class:`selbp.sampling.ScoreTable` as a step sees it: it writes rows, at once or when a GPU has sent them."""

    window: int
    adaptive: bool = False  # tables that were pickled before there was a choice have none
    device: torch.device
    _time: int  # how often rows have been recorded
    _prior: float  # the weight that the first eps, which nothing was learned from, has in today's
    _arriving: list[tuple[Any, list[Tensor | None], int, Draw]]

    @torch.no_grad()
    def record(
        self,
        draw: Draw,
        target: Tensor,
        *,
        logits: Tensor | None = None,
        losses: Tensor | None = None,
        place: Tensor | None = None,
        live: Tensor | None = None,
    ) -> None:
        """Write what a step saw of rows of ``draw``; waits for no device.

        Parameters
        ----------
        draw : Draw
            The minibatch.
        target : Tensor (rows,) int64
            Labels, or anything where the table has no classes.
        logits : Tensor (rows, C) or None
            For a table with classes.
        losses : Tensor (rows,) or None
            For one without: the mean loss of each.
        place : Tensor (rows,) int64 or None
            Each row's place in the minibatch; None: as they come.
        live : Tensor (rows,) bool or None
            Rows that count; None: all.

        Raises
        ------
        ValueError
            The shapes do not fit, or a label (looked at on a CPU) is not the one that the table has of its sample: then
            the batches did not come in the sampler's order.
        """
        self.arrive(wait=False)
        if self.classes is not None:
            if logits is None:
                raise ValueError("a table with classes records logits (rows, C), got None")
            check_rows(logits, target, len(target), self.classes)
            seen = [logits.detach().float(), target, place, live]
        else:
            if losses is None or losses.dim() != 1:
                raise ValueError(f"a table without classes records losses (rows,), got {shown(losses)}")
            seen = [losses.detach().float(), None, place, live]
        self._time += 1
        first = seen[0]
        if first is not None and first.device.type != self.device.type:
            self._arriving.append((*_sent(seen, self.device), self._time, draw))
            return
        self._write(seen, self._time, draw)

    def arrive(self, *, wait: bool) -> None:
        """Write what other devices have sent so far; with ``wait``, all of it."""
        while self._arriving and (wait or self._arriving[0][0].query()):
            event, seen, time, draw = self._arriving.pop(0)
            if wait:
                event.synchronize()
            self._write(seen, time, draw)

    def _write(self, seen: list[Tensor | None], time: int, draw: Draw) -> None:
        first, target, place, live = seen
        assert first is not None
        if self.classes is None:
            fresh = Fresh(draw.ids, draw.uniform, place, live, first)
            self._write_losses(fresh, first, time)
            return
        assert target is not None
        fresh = Fresh(draw.ids, draw.uniform, place, live, target)
        self._raise_mismatch(record(self._columns, self._averages, fresh, first, time), fresh)
        self._prior *= max(0.0, 1.0 - self._entered(fresh, time) / self.window)
        learns = draw.uniform and not self.adaptive  # a transition that was read off the surest samples stays
        if self._averages.counts is not None and self._averages.transition is not None and learns:
            self._averages.transition.copy_(normalised(self._averages.counts, 1.0 / self.window))

    def _entered(self, fresh: Fresh, time: int) -> int:
        """How many of the rows that :func:`record` was given have entered the averages."""
        if self.device.type != "cpu":  # to count them would wait; only a table on the CPU reads the prior
            return min(fresh.uniform, len(fresh.target))
        written = self._columns.seen[fresh.samples()] == time
        return int((written & fresh.drawn_uniformly()).sum())

    def _write_losses(self, fresh: Fresh, losses: Tensor, time: int) -> None:
        p = (-losses.double()).exp().clamp(max=1.0)
        counted = torch.isfinite(losses) if fresh.live is None else torch.isfinite(losses) & fresh.live
        place = torch.where(counted, fresh.samples(), self.samples)
        ones = torch.ones_like(p)
        self._columns.probability.scatter_(0, place, p.float())
        self._columns.responsibility.scatter_(0, place, ones.float())
        self._columns.seen.scatter_(0, place, torch.full_like(place, time))
        remember(self._averages, counted & fresh.drawn_uniformly(), ones, 1.0 - p, None, None)

    def _raise_mismatch(self, row: int, fresh: Fresh) -> None:
        if row >= 0:
            sample = int(fresh.samples()[row])
            raise ValueError(
                f"target {int(fresh.target[row])} of row {row} is not the label {int(self.label[sample])} that the "
                f"table has of sample {sample}: the step must be given the sampler's batches in order (call "
                "sampler.skip() for one that is left out). Where the label was changed, call table.forget(ids)"
            )

    def _require_classes(self) -> int:
        if self.classes is None:
            raise ValueError("this needs a table with classes=, the number of classes")
        return self.classes


def check_rows(logits: Tensor, target: Tensor, rows: int, classes: int) -> None:
    """Raise TypeError or ValueError unless ``logits`` are (rows, classes), floating, and ``target`` (rows,) int64."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"logits must be a floating tensor (n, C), got {shown(logits)}")
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (rows,):
        raise ValueError(f"target must be (n,) = ({rows},) int64 classes, got {shown(target)}")
    if logits.shape != (rows, classes):
        raise ValueError(f"logits must be (n, C) = ({rows}, {classes}) as the table's classes, got {shown(logits)}")


def _sent(seen: list[Tensor | None], device: torch.device) -> tuple[Any, list[Tensor | None]]:
    """Copies of ``seen`` on their way to ``device``, and the event after which they are there."""
    copies = [None if x is None else x.to(device, non_blocking=True) for x in seen]
    source = next(x.device for x in seen if x is not None)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(source if device.type == "cpu" else device))  # the one that copies
    return event, copies
