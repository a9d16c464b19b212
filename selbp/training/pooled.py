"""A step on more samples than one forward takes: in micro-batches, or among the samples of all ranks.

All samples are scored without a graph, the rule chooses among all of them, and the chosen rows run forward and backward
as many at a time as fit. The gradients add up to those of the one forward and backward that would not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from selbp.common.batch import Batch
from selbp.common.buffers import Written
from selbp.common.distributed import parallel_in, without_parallel
from selbp.common.exchange import Plan, Ranks
from selbp.common.guards import without_autocast
from selbp.common.keep import kept_rows
from selbp.common.lengths import Lengths
from selbp.common.outputs import logits_of
from selbp.sampling.issued import Draw
from selbp.training.auxiliary import add
from selbp.training.drawn import Drawn, digest, of_all
from selbp.training.found import Found, added
from selbp.training.head_gradient import FullHeadGradient
from selbp.training.interaction import Forwards
from selbp.training.minibatch import Minibatch
from selbp.training.options import UNSEEDED, StepOptions
from selbp.training.per_call import PerCall
from selbp.training.report import StepReport
from selbp.training.scored import Scored
from selbp.training.scores import for_table
from selbp.training.scoring import may_run, unscored
from selbp.training.stopwatch import Stopwatch
from selbp.training.strategies import UNSCORED
from selbp.types import MeanGradient, widest

if TYPE_CHECKING:
    from selbp.training.kinds import StepKinds

Scale = float | Tensor | Callable[[Tensor], Tensor]
Backward = Callable[[Tensor], None]  # runs the backward of one micro-batch's scalar

SAME_SEED = "pass each rank a generator with the same seed, and a rule that chooses by what it is given alone"
ONE_TABLE = "every rank's is told of all ranks' samples: load one rank's state_dict() on all of them"


def kept(keep: float | int, counts: Sequence[int]) -> int:
    """How many of all ranks' samples are kept: a share of all of them, or a number of each rank's own."""
    return sum(kept_rows(keep, n) for n in counts) if isinstance(keep, int) else kept_rows(keep, sum(counts))


def quotas(keep: float | int, counts: Sequence[int], k: int) -> list[int]:
    """How many of ``k`` chosen rows each rank trains: as many as of its own minibatch alone, where that adds up.

    Else the ranks' numbers differ by one at most.
    """
    own = [kept_rows(keep, n) for n in counts]
    if k in (sum(counts), sum(own)):
        return list(counts) if k == sum(counts) else own
    return [k // len(counts) + (rank < k % len(counts)) for rank in range(len(counts))]


class Mine(NamedTuple):
    """The chosen rows that this process trains."""

    batch: Batch
    rows: Tensor  # (k,) of the batch
    weights: Tensor  # (k,)
    finite: Tensor  # (k,) bool: which of them may run as they came
    own: Batch  # all that came to this process
    first: int = 0  # the number of its first sample
    plan: Plan | None = None  # where there are other ranks


def backward_of(scale: Any, run: Backward = Tensor.backward) -> Backward:
    """Runs the backward of a scalar times ``scale``, a number, a tensor () or a function such as a scaler's."""
    if callable(scale):
        return lambda loss: run(scale(loss))
    if isinstance(scale, bool) or not isinstance(scale, (int, float, Tensor)):
        raise TypeError(f"scale must be a number, a tensor () or a function of the loss, got {type(scale).__name__}")
    return lambda loss: run(loss if isinstance(scale, (int, float)) and scale == 1 else loss * scale)


class Pooled:
    """How a step works through its samples: ``size`` at a time (None: all), and among those of ``ranks``."""

    def __init__(self, step: StepKinds, size: int | None, ranks: Ranks | None, lengths: Lengths) -> None:
        self.step, self.size, self._ranks, self._lengths = step, size, ranks, lengths
        self._met = ranks is None

    @classmethod
    def of(cls, step: StepKinds, options: StepOptions) -> Pooled | None:
        """As the options say; None where one forward takes all samples. Raises ValueError for a wrapper's option."""
        if not options.pooled:
            return None
        parallel = parallel_in(step.model)
        if options.micro_batch is not None and parallel is not None and parallel.static_graph:
            raise ValueError(
                "micro_batch= goes without static_graph=True of DistributedDataParallel, whose first "
                "backward must average, and the first micro-batch's does not"
            )
        ranks = Ranks(step.model) if options.scope == "global" else None
        return cls(step, options.micro_batch, ranks, options.lengths())

    def run(
        self, batch: Batch, call: PerCall, draw: Draw | None, backward: Backward | None, written: Written
    ) -> tuple[Tensor, StepReport]:
        """One step. Without ``backward`` there is one micro-batch, and its scalar is returned with its graph."""
        step = self.step
        counts = [batch.n]
        if self._ranks is not None:
            batch, counts = self._ranks.meet(batch, self._lengths)
            if step._table is not None and self.world > 1:
                step._table.arrive(wait=True)  # so that every rank's loss reads the same
        drawn = None if draw is None else self._drawn(draw, batch.device, counts)
        m = self._asked(batch, call, None if drawn is None else drawn.draw, counts)
        scoring = m.selected and (m.rule.needs != "nothing" or step._full_head)
        step._comparison.begin(batch, scoring and m.k < m.batch.n)
        self._share_seed(batch.device)
        found = self._score(batch, m.watch, written) if scoring else self._unscored(batch)
        if self._ranks is not None:
            found, extras = found.over(self._ranks, counts, batch.extras, factors=self._reads_factors)
            m.batch = replace(m.batch, extras=extras)
        step._choose(m, found.scaled(step._reduce))
        del found  # and the factors, before the first graph
        mine = self._mine(batch, m, counts)
        m.watch.lap("select")
        training = Training(self, m, mine, scoring, written)
        loss = training.run(backward)
        m.scaled = torch.cat(training.losses) * m.scale
        if not scoring:
            logits = {"logits": self._everyone(torch.cat(training.outputs), mine)} if training.outputs else None
            losses, m.hits = torch.cat(training.losses), self._summed(added(training.hits))
            losses, m.scaled = self._everyone(losses, mine), self._everyone(m.scaled, mine)
            m.seen = logits, losses, m.selection.indices, m.live
        if step._table is not None and drawn is not None and drawn.draw.recorded:
            known = for_table(step._table, step._criterion, batch.target)
            drawn.write(step._table, self._ranks, counts, known, m.seen)
        way = step._strategy
        return loss, m.report(StepReport, way.name, way.reason if scoring else UNSCORED, scored=scoring)

    def _asked(self, batch: Batch, call: PerCall, draw: Draw | None, counts: list[int]) -> Minibatch:
        """What the schedule, the rule and the call ask for. Its batch is of all ranks' samples, but for the inputs."""
        step, n = self.step, sum(counts)
        call.check(n, batch.device)
        number = step._number(call)
        selects, draws = step.schedule.selects(number), step.schedule.draws(number)
        k = kept(step.keep, counts) if selects or draws or call.given is not None else n
        watch = Stopwatch(batch.device)
        return Minibatch(replace(batch, n=n), call, draw, step._rule(call), k, selects, watch, number)

    # ----------------------------------------------------------------------------------------------- scoring

    def _score(self, batch: Batch, watch: Stopwatch, written: Written) -> Found:
        step, unit = self.step, torch.ones((), dtype=widest(batch.device), device="cpu")
        parts = []
        for rows in self.split(torch.arange(batch.n, device=batch.device)):
            part = batch if len(rows) == batch.n else batch.take(rows)
            scored: Scored = step._score(part, watch, keep_graph=False, unit=unit)
            keeps = {"factors": self._reads_factors, "keep_output": self.keeps_logits}
            parts.append(Found.of(scored, step.head, batch.n, **keeps))
            watch.lap("score")
        step._end_scoring(written)
        return Found.joined(parts)

    @property
    def _reads_factors(self) -> bool:
        """Whether the choice, or the head's gradient, needs the head's factors; statistics follow from each part."""
        return self.step.selector.needs == "gradients" or self.step._full_head

    @property
    def keeps_logits(self) -> bool:
        """Whether a table of scores records logits; one without classes records losses."""
        return self.step._table is not None and self.step._table.classes is not None

    def _unscored(self, batch: Batch) -> Found:
        found = unscored(batch, self.step._criterion, self.step.model)
        return Found.of(found, None, batch.n, factors=False, keep_output=False)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """``x`` in micro-batches."""
        return (x,) if self.size is None else x.split(self.size)

    # ------------------------------------------------------------------------------------------------- ranks

    def _share_seed(self, device: torch.device) -> None:
        """At the first step, the same generator on every rank, rank 0's seed where none was given, and one table."""
        if self._met or self._ranks is None:
            return
        generator = self.step.generator
        assert generator is not None
        if torch.equal(generator.get_state(), torch.Generator(generator.device).manual_seed(UNSEEDED).get_state()):
            seed = torch.tensor([torch.initial_seed() & (2**62 - 1)], device=device)
            generator.manual_seed(int(self._ranks.each(seed)[0]))
        self._ranks.agree(generator.get_state(), device, "the same random draws", SAME_SEED)
        if (table := self.step._table) is not None and self.world > 1:
            self._ranks.agree(digest(table), device, "the same table", ONE_TABLE)

    def _mine(self, batch: Batch, m: Minibatch, counts: list[int]) -> Mine:
        """The chosen rows that are trained here: rows change place where a rank has chosen more than its share."""
        (indices, weights), criterion = m.selection, self.step._criterion
        if self._ranks is None or self._ranks.size == 1:
            self._met = True
            finite = may_run(batch, m.stats.valid, criterion)[indices]
            return Mine(batch, indices, weights, finite, batch)
        if not self._met:
            self._ranks.agree(indices, batch.device, "the same choice", SAME_SEED)
            self._met = True
        plan = Plan.of(indices.tolist(), counts, quotas(self.step.keep, counts, len(indices)))
        here = self._ranks.exchange(batch, plan, counts)
        place = torch.tensor(plan.slots(self._ranks.rank, self.world), dtype=torch.int64, device=batch.device)
        weights, valid = weights[place], m.stats.valid[indices[place]]
        if here is None:  # this rank trains none, but its gradients of 0 are averaged with the others'
            here = batch.take(torch.zeros_like(indices[:1]))
            weights, valid = weights.new_zeros(1), valid.new_zeros(1)
        rows, finite = torch.arange(here.n, device=batch.device), may_run(here, valid, criterion)
        return Mine(here, rows, weights, finite, batch, sum(counts[: self._ranks.rank]), plan)

    @property
    def world(self) -> int:
        """Over how many ranks the gradients of one choice are averaged."""
        return 1 if self._ranks is None else self._ranks.size

    def _drawn(self, draw: Draw, device: torch.device, counts: list[int]) -> Drawn:
        """Which samples these are, of all ranks."""
        if self._ranks is None or self.step._table is None:
            return Drawn(draw)
        return of_all(draw, self.step._table, self._ranks, counts, device)

    def _summed(self, hits: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        if hits is None or self._ranks is None:
            return hits
        correct, total = torch.stack(self._ranks.each(torch.stack(hits))).sum(0).unbind()
        return correct, total

    def _everyone(self, losses: Tensor, mine: Mine) -> Tensor:
        """(K, ...) what is known of the chosen rows on all ranks, in the selection's order."""
        if self._ranks is None or mine.plan is None:
            return losses
        slots = [mine.plan.slots(rank, self.world) for rank in range(self.world)]
        counts = [len(own) for own in slots]
        together = self._ranks.rows(losses[: counts[self._ranks.rank]], counts)
        result = torch.empty_like(together)
        result[torch.tensor([slot for own in slots for slot in own], device=losses.device)] = together
        return result


class Training:
    """The chosen rows' forward and backward, a micro-batch at a time, and what they gave."""

    def __init__(self, pooled: Pooled, m: Minibatch, mine: Mine, scoring: bool, written: Written) -> None:
        self._pooled, self._step, self._m, self._mine, self._scoring = pooled, pooled.step, m, mine, scoring
        self._written = written
        self._pause = scoring and pooled.step._scoring == "same"
        self.losses: list[Tensor] = []  # unscaled
        self.outputs: list[Tensor] = []  # that a table wants, of a step that scored nothing
        self.hits: list[tuple[Tensor, Tensor] | None] = []  # of such a step too

    def run(self, backward: Backward | None) -> Tensor:
        """() the last micro-batch's scalar; detached, once its backward has run."""
        m, mine = self._m, self._mine
        parts = list(zip(*map(self._pooled.split, (mine.rows, mine.weights, mine.finite)), strict=True))
        for turn, (rows, weights, finite) in enumerate(parts):
            last = turn == len(parts) - 1
            with self._averaged(last), self._written.replayed() if self._pause else nullcontext():
                loss = self._forward(rows, weights, finite, last)
                m.watch.lap("forward")
                if backward is None:
                    m.watch.follow(loss)
                    if self._pause:
                        self._written.kept_in_backward(loss)
                else:
                    with without_autocast(loss.device):
                        backward(loss)
                    loss = loss.detach()
                    m.watch.lap("backward")
        return loss

    def _averaged(self, last: bool) -> AbstractContextManager[None]:
        """Have a wrapper average over the ranks with the ``last`` micro-batch only, when the gradients are whole."""
        parallel = parallel_in(self._step.model)
        context: AbstractContextManager[None] = nullcontext() if last or parallel is None else parallel.no_sync()
        return context

    def _forward(self, rows: Tensor, weights: Tensor, finite: Tensor, last: bool) -> Tensor:
        """() the scalar of some of the rows."""
        step, m, live = self._step, self._m, weights != 0
        batch = self._mine.batch.rows(rows, finite)
        full = FullHeadGradient(step.head) if m.mean is not None and step.head is not None else None
        with nullcontext() if full is None else full.replacing():
            output = batch.feed(step.model)
            losses = step._losses(output, batch, m.batch.n)
            if not self.losses:
                self._compare(rows, live, losses, output)
        self.losses.append(losses.detach())
        if not self._scoring:
            with torch.no_grad():
                self.hits.append(step._criterion.hits(output, batch.target, live))
                self.outputs += [logits_of(output).detach()] if self._pooled.keeps_logits else []
        loss = torch.where(live, losses * m.scale * weights.to(losses.dtype), 0).sum() * self._pooled.world
        if full is not None and m.mean is not None:
            loss = full.deliver(loss, m.mean if last else _zero(m.mean))
        auxiliary = step._auxiliary(output)
        return add(loss, None if auxiliary is None else auxiliary * (len(rows) / len(self._mine.rows)), m.share)

    def _compare(self, rows: Tensor, live: Tensor, losses: Tensor, output: Any) -> None:
        """Look for samples that interact, on a few that came to this process: all at once may not fit."""
        step, m = self._step, self._m
        model = without_parallel(step.model)

        def alone(some: Batch) -> tuple[Tensor, Any]:
            made = some.feed(model)
            return step._criterion.losses(made, some.target, some.n), made

        own = self._mine.own
        forwards = Forwards(rows, live, m.unscaled, losses, output)
        valid = m.stats.valid[self._mine.first : self._mine.first + own.n]
        step._comparison.end(own, forwards, valid, alone, same_forward=False)


def _zero(mean: MeanGradient) -> MeanGradient:
    """A mean gradient of 0, for the micro-batches that the whole one is not delivered with."""
    return MeanGradient._make(None if x is None else torch.zeros_like(x) for x in mean)
