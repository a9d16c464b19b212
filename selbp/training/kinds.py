"""The kinds of step, one method each.

A full step trains on every row. An unscored one chooses before the forward, which runs the chosen rows only. A scored
one chooses by what a forward of all rows said, and gets the chosen rows' losses from a second forward of them, or from
the first one's graph. A step with a cut chooses in the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.batch import Batch
from selbp.common.buffers import Buffers, Written, buffers_put_back
from selbp.common.exchange import Ranks
from selbp.common.guards import without_autocast
from selbp.common.in_place import Untouched
from selbp.common.keep import kept_rows
from selbp.cut.report import CutReport
from selbp.ops._backends import saves_launches
from selbp.ops.minibatch import weighted_loss
from selbp.sampling.issued import Draw
from selbp.selectors import Full, Random, Selector
from selbp.selectors.base import check_selection
from selbp.selectors.top import TARGETS
from selbp.training.auxiliary import Auxiliary, add
from selbp.training.head import check_full_gradient, find_clear_head, find_head
from selbp.training.head_gradient import FullHeadGradient, mean_of
from selbp.training.interaction import FirstComparison, Forwards, normalises_by_rows
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.losses import Criterion, CrossEntropy, of_some
from selbp.training.minibatch import Minibatch, in_order
from selbp.training.options import StepOptions
from selbp.training.per_call import Given, PerCall
from selbp.training.placed_cut import CutStepReport, PlacedCut
from selbp.training.pooled import Backward, Pooled
from selbp.training.report import StepReport
from selbp.training.schedule import Schedule
from selbp.training.scored import Scored, worth_keeping
from selbp.training.scores import for_table, weighted, write_back
from selbp.training.scoring import Scorer, may_run, unscored
from selbp.training.sketched import Sketcher
from selbp.training.stopwatch import AHEAD, Stopwatch
from selbp.training.strategies import UNSCORED, row_losses
from selbp.types import Selection

Context = Callable[[], AbstractContextManager[None]]
FULL, RANDOM = Full(), Random()  # the rules of steps on which the selector is not asked


class StepKinds:
    """What a step is made of, and a method for each kind of step. It counts nothing and puts nothing back."""

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        self.model, self.selector, self.keep = model, options.selector, options.keep
        self.generator, self.schedule = options.draws_from(model), options.schedule or Schedule()
        self._step = self._last = 0  # the number of the next optimizer step, and that of the last call's
        self._criterion: Criterion = options.criterion()
        self._headless: Context = nullcontext
        self._auxiliary = Auxiliary(model, options.aux_weight, taken=isinstance(options.loss, str)).of
        self._strategy = options.strategy()
        self._scoring, self._precision = options.scoring, options.scoring_precision
        self._full_head, self._gradients = options.full_head, options.reads_gradients
        self._cut = None if options.cut is None else _placed(model, options.cut, options)
        wanted = self._gradients or options.head is not None or options.linear
        self.head = find_head(model, options.head) if wanted else find_clear_head(model)
        if options.linear:
            self._without_logits()
        if self._full_head:
            assert self.head is not None
            check_full_gradient(model, self.head)
        self._reduce = Ranks(model).average if options.target == "global" else None
        self._table = options.table
        self._scorer = Scorer(
            self.head,
            self._criterion,
            self._gradients,
            self._scoring,
            self._precision,
            self._reduce,
            self._auxiliary,
            Sketcher() if options.proxy == "sketch" else None,
            keep_output=self._table is not None,
        )
        self._comparison, self._untouched = FirstComparison(model), Untouched()
        self._buffers = Buffers(model)
        self._pooled = Pooled.of(self, options)

    def _without_logits(self) -> None:
        """Have the criterion read the head's input. Raises ValueError for a head with more to it than a weight."""
        assert isinstance(self._criterion, CrossEntropy)
        assert self.head is not None
        if self._cut is not None and self._cut.module is self.head:
            raise ValueError('loss="linear_causal_lm" does not run the head: cut= must be a module before it')
        self._criterion = linear = LinearCausalLM(self._criterion, self.model, self.head)
        self._headless = linear.headless

    def _run(
        self, batch: Batch, call: PerCall, draw: Draw | None, backward: Backward | None
    ) -> tuple[Tensor, StepReport]:
        """Run the kind of step that the schedule, the rule and the call ask for."""
        with self._headless():
            if self._pooled is not None:
                with self._buffers.followed() as written:
                    return self._pooled.run(batch, call, draw, backward, written)
            return self._run_kind(batch, call, draw)

    def _run_kind(self, batch: Batch, call: PerCall, draw: Draw | None) -> tuple[Tensor, StepReport]:
        watch, k, step = Stopwatch(batch.device), kept_rows(self.keep, batch.n), self._number(call)
        selects = self.schedule.selects(step)
        if selects and self._cut is not None and call.given is None:
            return self._cut_step(Minibatch(batch, call, draw, FULL, k, True, watch, step), self._cut)
        rule = self._rule(call)
        m = Minibatch(batch, call, draw, rule, k, selects, watch, step)
        if selects and (rule.needs != "nothing" or self._full_head):
            return self._scored_step(m)
        return self._full_step(m) if rule is FULL and not selects else self._unscored_step(m)

    def _followed(self, m: Minibatch, *, replays: bool) -> AbstractContextManager[Any]:
        """Around a step's forwards: where one raises, its writes to buffers are undone. A capture runs nothing."""
        return nullcontext() if m.watch.idle and not replays else self._buffers.followed(replays=replays)

    def _number(self, call: PerCall) -> int:
        """The number of the call's optimizer step: rows that are given belong to the step of the call before."""
        return self._step if call.given is None else self._last

    def _rule(self, call: PerCall) -> Any:
        """Who chooses in this step: what the call gives, else what the schedule asks for."""
        if call.given is not None:
            return call.given
        if self.schedule.selects(self._step):
            return self.selector
        return RANDOM if self.schedule.draws(self._step) else FULL

    # ------------------------------------------------------------------------------------------ the kinds of step

    def _full_step(self, m: Minibatch) -> tuple[Tensor, StepReport]:
        """Train on every row, in one forward."""
        m.k = m.batch.n
        self._choose(m, unscored(m.batch, self._criterion, self.model))
        return self._train_unscored(m, m.batch.rows(None, self._finite(m)))

    def _unscored_step(self, m: Minibatch) -> tuple[Tensor, StepReport]:
        """Choose before the forward, which runs the chosen rows only."""
        self._choose(m, unscored(m.batch, self._criterion, self.model))
        return self._train_unscored(m, self._chosen_rows(m))

    def _train_unscored(self, m: Minibatch, rows: Batch) -> tuple[Tensor, StepReport]:
        """The one forward of ``rows``, and what the step returns."""
        with self._followed(m, replays=False):
            loss = self._loss(m, self._first_forward(m, rows, rows.feed(self.model)))
        return loss, m.report(StepReport, "recompute", UNSCORED)

    def _scored_step(self, m: Minibatch) -> tuple[Tensor, StepReport]:
        """Choose by a forward of all rows. The first such step decides what ``backward="auto"`` is."""
        way = self._strategy
        if way.undecided:
            way.decide(self.model, m.batch, m.k, self._criterion, self._scoring, self._auxiliary)
        head = FullHeadGradient(self.head) if self._full_head and self.head is not None else None
        trained = nullcontext if head is None else head.replacing
        with self._followed(m, replays=not way.keeps_graph) as written:
            losses = self._by_rows(m, trained) if way.keeps_graph else self._by_recompute(m, trained, written)
            loss = self._loss(m, losses, head)
        if not way.keeps_graph and self._scoring == "same":
            written.kept_in_backward(loss)
        return loss, m.report(StepReport, way.name, way.reason, scored=True)

    def _by_rows(self, m: Minibatch, trained: Context) -> Tensor:
        """(k,) losses of the scoring forward; their backward runs the chosen rows of it only.

        Where cross-entropy is fused, its graph begins at the chosen rows' logits.
        """
        way = self._strategy
        with trained():
            self._choose(m, self._score(m.batch, m.watch, keep_graph=True))
            assert m.trains is not None, "the scoring forward was asked to keep its graph"

            def again() -> Tensor:
                with buffers_put_back(self.model):
                    return self._forward(m, m.batch.rows(None, self._finite(m)))

            def of_logits(logits: Tensor, indices: Tensor) -> Tensor:
                return self._criterion.losses(logits, m.batch.target.index_select(0, indices), len(indices))

            to_losses = None if m.trains.dim() == 1 else of_logits
            return row_losses(m.trains, m.selection, again, to_losses, way.batchnorm, way.dense)

    def _by_recompute(self, m: Minibatch, trained: Context, written: Written) -> Tensor:
        """(k,) losses of a second forward, of the chosen rows. The first such step compares it with the scoring one."""
        self._comparison.begin(m.batch, m.k < m.batch.n)
        self._choose(m, self._score(m.batch, m.watch, keep_graph=False))
        self._end_scoring(written)
        same_mode = self._scoring == "same"

        def again(rows: Batch) -> tuple[Tensor, Any]:
            output = rows.feed(self._unwrapped)
            return self._losses(output, rows, m.batch.n), output

        with trained(), written.replayed() if same_mode else nullcontext():
            losses = self._forward(m, self._chosen_rows(m))
            if self._comparison.due:
                self._comparison.end(
                    m.batch,
                    Forwards(m.selection.indices, m.live, m.unscaled, losses, m.output),
                    self._finite(m),
                    again,
                    same_forward=same_mode and self._precision == "same" and not written.end(),
                )
        return losses

    def _end_scoring(self, written: Written) -> None:
        """The scoring forward has run: what it wrote is known, or in evaluation mode undone."""
        if self._scoring == "same":
            written.end()
        else:
            written.undo(learns=True)

    def _cut_step(self, m: Minibatch, cut: PlacedCut) -> tuple[Tensor, StepReport]:
        """Run an ordinary forward on all rows to the mean loss. The backward makes the choice."""
        report: CutStepReport | None = None

        def on_choice(chosen: CutReport) -> None:
            if report is not None:  # None: a backward inside the forward
                report.cut = chosen

        scored = unscored(m.batch, self._criterion, self.model)
        m.take(scored)
        m.choose(self._weighted(m, FULL.select(scored.stats, m.batch.n)))
        rows = m.batch.rows(None, self._finite(m))
        cut.check_once(rows)
        if isinstance(self._criterion, LinearCausalLM):
            self._criterion.forget()  # the forward of a look ahead
        with self._followed(m, replays=cut.strategy == "recompute") as written:
            losses = self._first_forward(m, rows, cut.feed(rows, on_choice, written))
            if m.auxiliary is not None and cut.strategy == "recompute":
                raise ValueError(
                    "cut= with backward='recompute' gives the model's aux_loss no gradient below the cut: use "
                    "backward='rows', or leave it out by aux_weight=0"
                )
            loss = self._loss(m, losses)
        report = m.report(CutStepReport, cut.strategy, f"the cut at {cut.name}")
        return loss, report

    # ---------------------------------------------------------------------------------------- what they are made of

    def _mean_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """() the mean loss of all rows, of a plain forward of ``model``."""
        with self._headless():
            output = batch.feed(model)
            return add(self._losses(output, batch, batch.n).mean(), self._auxiliary(output), None)

    def _score(self, batch: Batch, watch: Stopwatch, *, keep_graph: bool, unit: Tensor | None = None) -> Scored:
        """Run the forward that scores ``batch``. With ``unit``, ``batch`` is a part and its losses are in that unit."""
        model = self.model if keep_graph else self._unwrapped
        return self._scorer.score(
            batch,
            model,
            factors=self.selector.needs == "gradients" or self._full_head,
            keep_graph=keep_graph,
            feed=Batch.feed if keep_graph else self._untouched.feed,
            unit=unit,
            ran=lambda: watch.lap(AHEAD),
        )

    @property
    def _unwrapped(self) -> nn.Module:
        """The model for a forward that no backward follows: a wrapper's reducer must not see that.

        Code that was compiled with the wrapper runs as it is: without a gradient, the wrapper does not hear of it.
        """
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            inner: nn.Module = self.model.module
            return inner
        return self.model

    def _choose(self, m: Minibatch, scored: Scored) -> None:
        """Have the rule choose by ``scored``, of which the minibatch keeps what the rest of the step needs."""
        m.watch.lap("score")
        factor, proxies = None if m.draw is None else m.draw.weights, scored.proxies
        with torch.no_grad(), without_autocast(m.batch.device):
            own = self._select(m.rule, m.batch, scored, m.k)
            selection = self._weighted(m, own)
            if self._full_head and proxies is not None:
                m.mean = mean_of(proxies, factor)
        m.take(scored)
        if factor is not None and proxies is not None:  # figures are about what is trained: the weighted gradients
            proxies, m.own = proxies.times(factor), own
            m.stats = m.stats._replace(residual_sq=m.stats.residual_sq * factor.to(m.stats.residual_sq).square())
        m.proxies, m.k = worth_keeping(proxies, self.head, m.batch.n), len(selection.indices)
        m.choose(selection)
        m.watch.lap("select")

    def _weighted(self, m: Minibatch, selection: Selection) -> Selection:
        """The selection, with the sampler's factors where it gave any."""
        factor = None if m.draw is None else m.draw.weights
        return selection if factor is None else weighted(selection, factor, m.rule)

    def _select(self, rule: Selector, batch: Batch, scored: Scored, k: int) -> Selection:
        """The rule's choice. Raises TypeError or ValueError for what is no choice of k rows."""
        extras = batch.extras if scored.mass is None else {**batch.extras, TARGETS: scored.mass}
        found = rule.select(scored.stats, k, proxies=scored.proxies, extras=extras, generator=self.generator)
        chosen = not isinstance(rule, (Full, Given))
        selection = check_selection(rule, found, k if chosen else None, batch.n)
        return in_order(selection, scored) if chosen and len(selection.indices) == batch.n else selection

    def _finite(self, m: Minibatch) -> Tensor:
        """(n,) bool: the rows that may run as they came, see :func:`may_run`."""
        if m.finite is None:
            m.finite = may_run(m.batch, m.stats.valid, self._criterion)
        return m.finite

    def _chosen_rows(self, m: Minibatch) -> Batch:
        """The chosen rows. Those of weight 0 run as they came where the gradient may depend on them.

        Of a part of the rows that were scored it does by normalisation layers and the model's own loss alone: other
        samples that interact are refused.
        """
        indices, all_rows = m.selection.indices, m.k >= m.batch.n
        if m.finite is None and not (all_rows or m.auxiliary is not None or normalises_by_rows(self.model)):
            return m.batch.rows(indices, m.live)  # saves a GPU some launches
        return m.batch.rows(indices, self._finite(m)[indices])

    def _first_forward(self, m: Minibatch, rows: Batch, output: Any) -> Tensor:
        """(k,) losses of the one forward of a step that scores nothing; the report's accuracy is of it."""
        m.auxiliary = self._auxiliary(output)
        with torch.no_grad(), of_some(rows.n, m.batch.n):
            m.hits = self._criterion.hits(output, rows.target, m.live)
        losses = self._losses(output, rows, m.batch.n)
        m.seen = output, losses, m.selection.indices, m.live
        return losses

    def _forward(self, m: Minibatch, rows: Batch) -> Tensor:
        """(k,) losses of a forward that trains, after one that scored."""
        m.output = rows.feed(self.model)
        m.auxiliary = self._auxiliary(m.output)
        return self._losses(m.output, rows, m.batch.n)

    def _losses(self, output: Any, rows: Batch, n: int) -> Tensor:
        """(k,) losses of ``rows``; an error says that they are some of n."""
        with of_some(rows.n, n):
            return self._criterion.losses(output, rows.target, rows.n)

    def _loss(self, m: Minibatch, losses: Tensor, head: FullHeadGradient | None = None) -> Tensor:
        """() what to call ``backward()`` on, of the rows that train; the table is told what was seen."""
        if saves_launches(losses.device):
            loss, m.scaled = weighted_loss(losses, m.scale, m.selection.weights)
        else:
            m.scaled = losses * m.scale
            loss = torch.where(m.live, m.scaled * m.selection.weights.to(m.scaled.dtype), 0).sum()
        if head is not None and m.mean is not None:
            loss = head.deliver(loss, m.mean)
        loss = add(loss, m.auxiliary, m.share)
        m.watch.lap("forward")
        m.watch.follow(loss)
        if self._table is not None and m.draw is not None and m.draw.recorded:
            write_back(self._table, m.draw, for_table(self._table, self._criterion, m.batch.target), *m.seen)
        return loss


def _placed(model: nn.Module, place: nn.Module | str, options: StepOptions) -> PlacedCut:
    return PlacedCut(
        model,
        place,
        options.keep,
        options.selector,
        options.generator,
        recompute=options.recomputes,
        precision=options.scoring_precision,
        batchnorm=options.batchnorm,
    )
