"""``SelectiveBackprop``: one training step on a chosen part of the minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp._checks import check_flag, check_generator, shown
from selbp.common.batch import Batch
from selbp.common.distributed import averaging, check_not_bypassed, unwrap
from selbp.common.guards import PRECISIONS, RunningStatistics, capturing, without_autocast
from selbp.common.in_place import Untouched
from selbp.common.keep import check_keep, kept_rows
from selbp.common.places import Places
from selbp.common.state import CHOICE_ENTRIES, ChoiceState, check_counts
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.sampling.issued import Draw
from selbp.sampling.table import ScoreTable
from selbp.selectors import Full, Random, Selector
from selbp.selectors.top import TARGETS
from selbp.training.auxiliary import Auxiliary, add
from selbp.training.head import check_full_gradient, find_clear_head, find_head
from selbp.training.head_gradient import FullHeadGradient
from selbp.training.interaction import FirstComparison, SamplesInteractError
from selbp.training.losses import CrossEntropy, criterion_of, of_some, warn_of_unshifted_labels
from selbp.training.per_call import PerCall
from selbp.training.placed_cut import CutStepReport, PlacedCut
from selbp.training.report import StepReport
from selbp.training.schedule import Schedule
from selbp.training.scores import check_table, weighted, with_irreducible, write_back
from selbp.training.scoring import Scored, score, unscored, worth_keeping
from selbp.training.sketched import Sketcher
from selbp.training.stopwatch import Stopwatch
from selbp.training.strategies import UNSCORED, Strategy
from selbp.types import Selection

NEEDS = ("nothing", "loss", "statistics", "gradients")


class SelectiveBackprop:
    """Forward on all n samples, choose k of them with weights, and return a loss whose backward runs those k rows.

    The returned scalar is sum_j w_j l_j over the chosen rows, with l_i scaled so that (1/n) sum l_i is torch's
    ``reduction="mean"``: it is for ``backward()`` only (log ``step.report.loss``), and the sum of the weights scales
    the effective learning rate (``step.report.weight_sum``).

    Args:
        model: called as ``model(x)``, ``model(*tuple)`` or ``model(**dict)``. Never edited.
        selector: the rule. One that needs nothing chooses before the forward, which then runs k rows only.
        keep: a share in (0, 1] (float, k = max(1, round(keep n))) or a number of samples (int of at least 1):
            ``keep=1`` is one sample, ``keep=1.0`` all of them.
        head: the last linear layer or 1x1 convolution, or its name. Found by itself when no layer with parameters
            follows it; with LoRA on it, it is the adapted layer as a whole.
        loss: ``"cross_entropy"`` (also of (n, T, C) or (n, C, T, ...), and against class probabilities of the logits'
            shape), ``"mse"``, ``"bce"`` (of logits),
            ``"causal_lm"`` (targets are shifted by one) or a callable (output, target) -> (n,).
        backward: ``"rows"`` differentiates the chosen rows of the forward that scored; ``"recompute"`` runs a second
            forward on them, and refuses a loss in which samples interact, such as a contrastive one: their losses would
            be others alone, which its first step looks at. ``"auto"`` models both on the first minibatch and takes the
            cheaper, see :func:`diagnose`, and rows where samples interact.
        scoring: ``"same"`` scores with the forward as it trains: dropout is active, and batch norm updates its running
            statistics there and not in the forward of the chosen rows, which draws its own dropout masks. ``"eval"``
            scores in evaluation mode and leaves no trace: batch norm then follows the chosen rows.
        scoring_precision: ``"bfloat16"`` or ``"float16"`` scores under autocast to that type; the forward of the chosen
            rows keeps the caller's precision, so it goes with ``backward="recompute"``.
        head_gradient: ``"full"`` gives the head its exact full-batch gradient and uses the chosen rows for the layers
            below only.
        schedule: on which optimizer steps to choose; the others are full, or train on rows drawn at random.
        generator: where draws come from, on the model's device; torch's global one for None.
        class_weight, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        target: ``"local"`` matches the rank's own mean gradient, ``"global"`` that of all ranks, which need not have
            met before the first step; one process is all ranks. Selection is local to the rank either way, of k rows of
            each rank's minibatch.
        auto_advance: every call counts as one optimizer step, until :meth:`advance` is called for the first time. Under
            gradient accumulation with a schedule pass False and call :meth:`advance` after each optimizer step.
        cut: a module, or its name: choose in the backward, at that module's output, by the gradients there. All rows
            run forward; layers above the cut get their full-batch gradients. See :class:`selbp.BackwardCut`.
            With ``backward="recompute"`` the layers below keep no graph of that forward, and run again, in the
            backward, on the chosen rows.
        batchnorm: what a backward through rows does at BatchNorm in training mode, which couples the samples:
            ``"exact"`` runs it, and all below, on n rows; ``"subset"`` runs it on k rows with the statistics of the n,
            an approximation, see :func:`selbp.select`. A second forward has k rows' statistics either way.
        shared: names of entries of a dict batch, or positions in a tuple, that have no samples: the model is given them
            whole, whatever rows it runs on.
        batch_dims: ``{name or position: dim}``: where the samples of an entry are, if not in dim 0; 0 for a batch that
            is one tensor.
        target_keys: the entries of a dict batch that are the target, ``"labels"`` by default. Several are given to a
            callable loss as a dict.
        pass_labels: the model is called with those entries too, as one that derives decoder inputs from them needs.
        aux_weight: what the model's ``output.aux_loss``, such as the load balancing of a mixture of experts, counts
            beside a built-in loss. None for the model's ``router_aux_loss_coef`` where it has one, else 1; 0 leaves it
            out. A second forward has that of the chosen rows, rows of the forward that scored that of all.
        proxy: ``"sketch"`` compares the head gradients of sequences by random projections with unbiased inner products,
            see :func:`selbp.ops.sketch`, in place of the ``"exact"`` ones, which may cost more than the choice saves.
            Norms, and what the report says of gradients, are of the projections then. Samples with one position each
            are compared exactly.
        class_dim: where the classes of ``"cross_entropy"`` are in the logits: 1 as in torch, (n, C, ...), or -1, (n,
            ..., C). By default the target's shape (n, ...) tells, and where both fit an earlier minibatch's.
        table: a :class:`selbp.sampling.ScoreTable`, to which each step writes what it saw of its samples. Their numbers
            come from the table's sampler, in its order, or from ``ids=`` at the call. State: the table has its own.

    Raises:
        TypeError, ValueError: at construction, for anything that could not work later.

    Examples:
        >>> import torch, selbp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
        >>> for inputs, target in [(torch.randn(16, 4), torch.randint(0, 3, (16,)))]:
        ...     step(inputs, target).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> step.report.k
        4
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        selector: Selector,
        keep: float | int,
        head: nn.Module | str | None = None,
        loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
        backward: Literal["auto", "rows", "recompute"] = "auto",
        scoring: Literal["same", "eval"] = "same",
        scoring_precision: Literal["same", "bfloat16", "float16"] = "same",
        head_gradient: Literal["subset", "full"] = "subset",
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        target: Literal["local", "global"] = "local",
        auto_advance: bool = True,
        cut: nn.Module | str | None = None,
        batchnorm: BatchNormPolicy = "exact",
        class_dim: Literal[1, -1] | None = None,
        table: ScoreTable | None = None,
        shared: Iterable[str | int] = (),
        batch_dims: Mapping[str | int, int] | None = None,
        target_keys: Iterable[str] | None = None,
        pass_labels: bool = False,
        aux_weight: float | None = None,
        proxy: Literal["exact", "sketch"] = "exact",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(selector, type) or not isinstance(selector, Selector) or selector.needs not in NEEDS:
            raise TypeError(f"selector must be an instance of a selector such as selbp.Random(), got {selector!r}")
        for name, value, choices in (
            ("scoring", scoring, ("same", "eval")),
            ("head_gradient", head_gradient, ("subset", "full")),
            ("target", target, ("local", "global")),
            ("scoring_precision", scoring_precision, PRECISIONS),
            ("batchnorm", batchnorm, ("exact", "subset")),
            ("proxy", proxy, ("exact", "sketch")),
        ):
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {shown(value)}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a selbp.Schedule or None, got {type(schedule).__name__}")
        check_generator(generator)
        if cut is not None and not isinstance(cut, (nn.Module, str)):
            raise TypeError(f"cut must be a module of the model, its name or None, got {shown(cut)}")
        if target == "global" and selector.needs != "gradients":
            raise ValueError(f'target="global" is for rules that match gradients, not for {selector!r}')
        self.model, self.selector, self.keep = model, selector, check_keep(keep)
        self.generator, self.schedule = generator, schedule or Schedule()
        self._places = Places.of(shared, batch_dims, target_keys, pass_labels)
        warn_of_unshifted_labels(unwrap(model), loss)
        self._criterion = criterion_of(
            loss, class_weight=class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
            class_dim=class_dim,
        )  # fmt: skip
        self._auxiliary = Auxiliary(model, aux_weight, taken=isinstance(loss, str)).of
        self._strategy = Strategy(backward, batchnorm)
        if scoring == "eval" and self._strategy.keeps_graph:
            raise ValueError('scoring="eval" is for backward="recompute": the rows of a forward that trains are in use')
        if scoring_precision != "same":
            if self._strategy.keeps_graph or backward == "rows":
                raise ValueError(f'scoring_precision={scoring_precision!r} is for backward="recompute"')
            self._strategy = Strategy("recompute", reason="the scoring forward has another precision")
        recompute = self._strategy.decided_on("recompute")
        if batchnorm != "exact" and recompute:
            raise ValueError(f'batchnorm={batchnorm!r} is for a backward through rows: backward="recompute" has none')
        self._scoring: Literal["same", "eval"] = scoring
        self._precision = scoring_precision
        self._full_head = head_gradient == "full"
        self._sketch = Sketcher() if proxy == "sketch" else None
        if self._sketch is not None and (self._full_head or cut is not None):
            raise ValueError('proxy="sketch" goes with none of cut and head_gradient="full": it has no exact gradient')
        self._cut = None
        if cut is not None:
            self._cut = PlacedCut(
                model, cut, keep, selector, generator,
                recompute=recompute, precision=scoring_precision, batchnorm=batchnorm,
            )  # fmt: skip
        if self._cut is not None and (self._full_head or scoring == "eval" or target == "global" or head is not None):
            raise ValueError("cut= goes with none of head, head_gradient, scoring and target: it needs no scoring")
        self._gradients = (selector.needs in ("statistics", "gradients") or self._full_head) and self._cut is None
        self.head = find_head(model, head) if self._gradients or head is not None else find_clear_head(model)
        width = getattr(self.head, "weight", None)
        if isinstance(self._criterion, CrossEntropy) and isinstance(width, Tensor):
            self._criterion.check_classes(len(width), "the head")
        if self._full_head:
            assert self.head is not None
            check_full_gradient(model, self.head)
        self._reduce = averaging(model) if target == "global" else None
        self._table = check_table(table)
        self._running, self._choice = RunningStatistics(model), ChoiceState(selector, generator)
        self._comparison = FirstComparison(model)
        self._step, self._auto_advance = 0, check_flag("auto_advance", auto_advance)
        self._untouched = Untouched()
        self._synchronised = False  # whether the gradients are known to reach the other ranks
        self._report: StepReport | None = None

    # ------------------------------------------------------------------------------------------------ the step

    def __call__(
        self,
        inputs: Any,
        target: Any = None,
        *,
        normalizer: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        selection: Selection | None = None,
        **per_sample: Tensor,
    ) -> Tensor:
        """One minibatch: returns the scalar to call ``backward()`` on.

        Args:
            inputs: a tensor, a tuple or a dict whose tensors have n rows. Beside tensors, or in them, a list, tuple or
                array of n entries that are not tensors of n rows (strings, ragged tensors, dicts of boxes) is one entry
                a sample, and the chosen ones are taken; what has another length is a constant.
            target: n rows; for a dict, its ``"labels"`` where None.
            normalizer: what the sum of the losses is divided by, in place of this minibatch's own targets: those that
                count in all minibatches of one optimizer step (tokens for ``"causal_lm"``; the sum of their class
                weights where there are any; samples for a loss other than cross-entropy). The gradients then add up
                to that of the whole, however the targets are spread; do not divide by the number of minibatches.
            num_items_in_batch: the same, by the name that Hugging Face's trainer has for it.
            selection: rows and weights to train on, such as ``step.report.selection``, in place of a choice: nothing is
                scored, and only those rows run forward. The call belongs to the optimizer step of the one before, as
                the second pass of SAM does: it is not counted.
            per_sample: tensors (n,) that the selector knows by name. With ``table``, ``ids`` are the samples' numbers,
                int64.

        Raises:
            TypeError, ValueError: for a batch that does not fit, before anything has run. Whatever is raised, also by
                the model, the selector, the generator and the running statistics are left as they were.
        """
        call = PerCall.of(normalizer, num_items_in_batch, selection)
        table, ids = self._table, None
        if table is not None:
            ids = per_sample.pop("ids", None)
        batch = Batch.of(inputs, target, per_sample, self._places)
        call.check(batch.n, batch.device)
        # A second pass, whose rows are given, is of a batch that has been counted.
        issued = None if table is None or call.given is not None else table.next(batch.n, ids)
        if table is not None and issued is not None:
            batch = with_irreducible(batch, table, issued)
        self._synchronised = self._synchronised or check_not_bypassed(self.model)
        # In a capture nothing runs that could be put back, and a generator's state must not be read.
        restore = () if capturing(batch.device) else (self._choice.snapshot(), self._running.snapshot())
        try:
            try:
                loss, report = self._run(batch, call, issued)
            except SamplesInteractError:
                if not self._strategy.auto or self._scoring != "same":
                    raise
                for undo in restore:
                    undo()
                self._strategy.settle("rows", "samples interact: a second forward of some would train another loss")
                loss, report = self._run(batch, call, issued)
        except BaseException:
            for undo in restore:
                undo()
            raise
        self._report = report
        if table is not None and issued is not None:
            table.issued.done(issued)
            report.table = table
        if self._auto_advance and call.given is None:
            self._step += 1
        return loss

    def _run(self, batch: Batch, call: PerCall, issued: Draw | None) -> tuple[Tensor, StepReport]:
        watch, k = Stopwatch(batch.device), kept_rows(self.keep, batch.n)
        chosen, drawn = self.schedule.selects(self._step), self.schedule.draws(self._step)
        if self._cut is not None and chosen and call.given is None:
            return self._run_cut(batch, self._cut, watch, k, call, issued)
        rule: Any = call.given or (self.selector if chosen else Random() if drawn else Full())
        selecting = chosen or drawn or call.given is not None
        scoring = chosen and (rule.needs != "nothing" or self._full_head)
        if scoring and self._strategy.undecided:
            self._strategy.decide(self.model, batch, k, self._criterion, self._scoring, self._auxiliary)
        strategy = self._strategy if scoring else UNSCORED
        self._comparison.begin(batch, scoring and not strategy.keeps_graph and k < batch.n)
        full_head = FullHeadGradient(self.head) if scoring and self._full_head and self.head is not None else None
        trained = full_head.replacing if full_head is not None else nullcontext
        with trained() if strategy.keeps_graph else nullcontext():
            scored = (
                self._score(batch, strategy.keeps_graph) if scoring else unscored(batch, self._criterion, self.model)
            )
        watch.lap("score")
        with torch.no_grad(), without_autocast(batch.device):
            selection = self._select(rule, batch, scored, k if selecting else batch.n)
            if issued is not None and issued.weights is not None:
                selection = weighted(selection, issued.weights, rule)
            mean = scored.proxies.mean_gradient() if full_head is not None and scored.proxies is not None else None
        proxies, hits = worth_keeping(scored.proxies, self.head, batch.n), scored.hits
        losses_of_forward, unscaled, scale = scored.losses, scored.stats.loss, scored.scale
        auxiliary, share = scored.auxiliary, call.share(scored, batch.n)
        stats = scored.stats._replace(loss=scored.stats.loss * scale)  # as the report averages it
        seen: tuple[Any, Tensor, Tensor | None, Tensor] = scored.output, unscaled, None, stats.valid
        del scored  # and with it the factors, unless they are worth keeping
        watch.lap("select")
        output: Any = None

        def forward(rows: Batch) -> Tensor:
            nonlocal hits, output, auxiliary
            output = rows.feed(self.model)
            auxiliary = self._auxiliary(output)
            if not scoring:
                with torch.no_grad(), of_some(rows.n, batch.n):
                    hits = self._criterion.hits(output, rows.target, selection.weights != 0)
            with of_some(rows.n, batch.n):
                return self._criterion.losses(output, rows.target, rows.n)

        pause = scoring and self._scoring == "same" and not strategy.keeps_graph
        with trained(), self._running.paused() if pause else nullcontext():
            if selecting:
                losses = strategy.chosen_losses(batch, selection, forward, losses_of_forward)
                self._comparison.end(
                    batch, selection.indices, selection.weights != 0, stats.valid, unscaled, losses, output,
                    lambda rows: (forward(rows), output), pause and self._precision == "same",
                )  # fmt: skip
            else:
                losses = forward(batch.rows(None, stats.valid))
        if not scoring:
            seen = output, losses, selection.indices, selection.weights != 0
        scaled = losses * scale
        loss = torch.where(selection.weights != 0, scaled * selection.weights.to(scaled.dtype), 0).sum()
        if full_head is not None and mean is not None:
            loss = full_head.deliver(loss, mean)
        loss = add(loss, auxiliary, share)
        watch.lap("forward")
        watch.follow(loss)
        report = StepReport(
            batch.n, len(selection.indices), self._step, chosen, scoring, strategy.name,
            self._strategy.reason, selection, stats, proxies, scaled.detach(), hits, watch, share,
        )  # fmt: skip
        if self._table is not None and issued is not None:
            write_back(self._table, issued, batch.target, *seen)
        return loss, report

    def _run_cut(
        self, batch: Batch, cut: PlacedCut, watch: Stopwatch, k: int, call: PerCall, issued: Draw | None
    ) -> tuple[Tensor, StepReport]:
        """Run an ordinary forward on all rows to the mean loss. The backward makes the choice."""
        report: CutStepReport | None = None

        def on_choice(chosen: CutReport) -> None:
            if report is not None:  # None: a backward inside the forward
                report.cut = chosen

        scored = unscored(batch, self._criterion, self.model)
        selection = Full().select(scored.stats, batch.n)
        clean = batch.rows(None, scored.stats.valid)
        output = cut.feed(clean, on_choice)
        if (auxiliary := self._auxiliary(output)) is not None and cut.strategy == "recompute":
            raise ValueError(
                "cut= with backward='recompute' gives the model's aux_loss no gradient below the cut: use "
                "backward='rows', or leave it out by aux_weight=0"
            )
        with torch.no_grad():
            hits = self._criterion.hits(output, batch.target, scored.stats.valid)
        losses = self._criterion.losses(output, clean.target, clean.n)
        if self._table is not None and issued is not None:
            write_back(self._table, issued, batch.target, output, losses, None, scored.stats.valid)
        scaled = losses * scored.scale
        loss = torch.where(selection.weights != 0, scaled * selection.weights.to(scaled.dtype), 0).sum()
        share = call.share(scored, batch.n)
        loss = add(loss, auxiliary, share)
        watch.lap("forward")
        watch.follow(loss)
        report = CutStepReport(
            batch.n, k, self._step, True, False, cut.strategy, f"the cut at {cut.name}",
            selection, scored.stats, None, scaled.detach(), hits, watch, share,
        )  # fmt: skip
        return loss, report

    def _score(self, batch: Batch, keep_graph: bool) -> Scored:
        model = self.model
        if isinstance(model, nn.parallel.DistributedDataParallel) and not keep_graph:
            model = model.module  # its reducer must not see a forward that no backward follows
        return score(
            batch, model, self.head, self._criterion,
            gradients=self._gradients, mode=self._scoring, precision=self._precision, keep_graph=keep_graph,
            reduce=self._reduce, feed=Batch.feed if keep_graph else self._untouched.feed,
            keep_output=self._table is not None, auxiliary=self._auxiliary, sketch=self._sketch,
        )  # fmt: skip

    def _select(self, rule: Selector, batch: Batch, scored: Scored, k: int) -> Selection:
        extras = batch.extras if scored.mass is None else {**batch.extras, TARGETS: scored.mass}
        selection = rule.select(scored.stats, k, proxies=scored.proxies, extras=extras, generator=self.generator)
        indices, weights = selection
        if indices.dim() != 1 or indices.shape != weights.shape or indices.dtype != torch.int64:
            raise ValueError(
                f"{rule!r} must return indices (k,) int64 and weights (k,), "
                f"got {indices.dtype} {tuple(indices.shape)} and {tuple(weights.shape)}"
            )
        return selection

    # --------------------------------------------------------------------------------------- report and state

    @property
    def report(self) -> StepReport:
        """The last step's figures. Raises RuntimeError before the first one."""
        if self._report is None:
            raise RuntimeError("there is no report before the first step")
        return self._report

    @property
    def table(self) -> ScoreTable | None:
        """The table of scores that the step writes to."""
        return self._table

    @property
    def optimizer_step(self) -> int:
        """How many optimizer steps have been counted."""
        return self._step

    def advance(self) -> None:
        """Count one optimizer step: call it after ``optimizer.step()`` when gradients are accumulated.

        From the first call on, calls of the step no longer count by themselves; those before it were one step.
        """
        self._step = 1 if self._auto_advance else self._step + 1
        self._auto_advance = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue bit for bit, beside model and optimizer.

        Without a ``generator`` of its own, draws come from torch's global one, whose state is the caller's to save.
        """
        counts = {"optimizer_step": self._step, "auto_advance": self._auto_advance, "backward": self._strategy.decision}
        return {**counts, **self._choice.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        count, auto, backward = check_counts(state)
        self._choice.load_state_dict({name: state[name] for name in CHOICE_ENTRIES})
        self._step, self._auto_advance = count, auto
        self._strategy.restore(backward)
