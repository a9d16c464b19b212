"""The scoring forward: statistics and gradient proxies of all n samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp import ops
from selbp._torch import without_autocast_cache
from selbp.common.batch import Batch
from selbp.common.distributed import inner_outputs
from selbp.common.guards import evaluating, scoring_autocast, without_autocast
from selbp.common.outputs import check_classes_of, logits_of
from selbp.common.proxies import HeadProxies
from selbp.ops._backends import saves_launches
from selbp.ops.minibatch import unscored as unscored_rows
from selbp.ops.score_minibatch import score_minibatch
from selbp.reference.losses import scale_of
from selbp.training.head import Captured, capture, listed_candidates
from selbp.training.head_kinds import is_pointwise, positions_last
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.loss_rows import LossRows, from_features, from_logits, from_losses, operands
from selbp.training.losses import Criterion, CrossEntropy
from selbp.training.scored import Reduce, Scored, in_units
from selbp.training.sketched import Sketcher
from selbp.training.strategies import may_ask
from selbp.types import BatchStatistics, real_dtype


@dataclass(slots=True)
class _Forward:
    """One forward of all rows, and its losses where the loss computes them itself."""

    output: Any
    returned: Any  # the output in whose graph gradients may be read: under DDP the inner model's
    captured: Captured
    features: Tensor | None  # the head's input (n, ..., d)
    fused: bool  # the loss is cross-entropy of what the head gave, as it gave it
    auxiliary: Tensor | None
    losses: Tensor | None  # (n,) with their graph, where that is kept; None too where they are fused
    read: Tensor | None  # (n,) the losses in whose graph gradients may be read


@dataclass(frozen=True)
class Scorer:
    """Runs the forward on all rows, and says of each what a rule may ask for."""

    head: nn.Module | None
    criterion: Criterion
    gradients: bool  # whether gradient norms and proxies are read as well as losses
    mode: Literal["same", "eval"]
    precision: Literal["same", "bfloat16", "float16"]  # of the forward, see scoring_autocast
    reduce: Reduce | None  # averages the mean gradient over ranks
    auxiliary: Callable[[Any], Tensor | None]  # reads the model's own further loss off its output
    sketch: Sketcher | None  # stands for the exact gradients of samples with several positions
    keep_output: bool

    def score(
        self,
        batch: Batch,
        model: nn.Module,
        *,
        factors: bool,
        keep_graph: bool,
        feed: Callable[[Batch, nn.Module], Any],
        unit: Tensor | None,
        ran: Callable[[], None],
    ) -> Scored:
        """Score all rows of ``batch``.

        ``factors`` says that the rule will read the proxies. ``keep_graph`` records the forward for a backward through
        chosen rows of it; else nothing is recorded below the head. ``feed`` calls the model. ``unit`` () is the scale
        in place of this batch's own: 1 where the batch is a part of a minibatch. ``ran`` is called after the forward
        and the losses, before scoring.
        """
        criterion = self.criterion
        at_once = unit is None and scores_at_once(batch.device) and _has_one_label_each(criterion, batch.target)
        known = None if at_once else criterion.mass(batch.target, batch.n, batch.device)  # raises before the forward
        seen = self._forward(batch, model, feed, keep_graph)
        ran()
        bias = getattr(self.head, "bias", None) is not None
        with torch.no_grad(), without_autocast(batch.device):
            if seen.fused and known is None:
                scored = self._at_once(seen, batch.target, bias, factors)
            else:
                mass, present = known or criterion.mass(batch.target, batch.n, batch.device)
                rows = self._rows(seen, batch.target, present, bias, keep_graph, model)
                scored = in_units(rows, mass, bias, self.gradients, self.reduce, self.sketch, unit)
        scored.auxiliary = seen.auxiliary
        if keep_graph:
            scored.trains = logits_of(seen.output) if seen.losses is None else seen.losses
        if self.keep_output:
            scored.output = seen.output
        return scored

    def _forward(
        self, batch: Batch, model: nn.Module, feed: Callable[[Batch, nn.Module], Any], keep_graph: bool
    ) -> _Forward:
        """Run the forward, and the loss where the fused operators do not stand for it."""
        head, criterion = self.head, self.criterion
        linear = isinstance(criterion, LinearCausalLM)  # then the model returns the head's input
        with evaluating(model, batch.device) if self.mode == "eval" else nullcontext():
            autocast = nullcontext() if keep_graph else without_autocast_cache()
            with autocast, scoring_autocast(batch.device, self.precision):
                leaf = self.gradients and not keep_graph
                watch = capture(None if linear else head, leaf=leaf, optional=not self.gradients)
                whole = inner_outputs(model, trains=keep_graph)
                with torch.set_grad_enabled(keep_graph), watch as captured, whole as inner:
                    output = feed(batch, model)
        returned = inner[-1] if inner else output
        features = logits = None
        # A rule that reads losses does without a head that ran twice, or not at all.
        if head is not None and not linear and (self.gradients or captured.calls == 1):
            features, logits = captured.check(model)
            features = positions_last(head, features)
        fused = (
            isinstance(criterion, CrossEntropy)
            and not criterion.soft(batch.target)
            and (logits is None or self._reads_as_given(captured, logits, output, returned, batch.target))
        )
        auxiliary = self.auxiliary(output)  # here, where a gradient is recorded if the graph is kept
        losses = read = None
        if not fused and (keep_graph or not linear):
            with torch.set_grad_enabled(keep_graph or self.gradients):
                losses = read = criterion.losses(output, batch.target, batch.n)
                if inner and self.gradients and not linear:
                    read = criterion.losses(returned, batch.target, batch.n)
        return _Forward(output, returned, captured, features, fused, auxiliary, losses, read)

    def _reads_as_given(self, captured: Captured, logits: Tensor, output: Any, returned: Any, target: Any) -> bool:
        """Whether the loss reads the head's output with its classes last, as the head gave it."""
        assert isinstance(self.criterion, CrossEntropy)
        convolution = self.head is not None and is_pointwise(self.head)
        if captured.edited or convolution or not _is_head_output(returned, logits):
            return False
        return self.criterion.classes_last(logits_of(output), target)

    def _rows(
        self, seen: _Forward, target: Any, present: Tensor, bias: bool, keep_graph: bool, model: nn.Module
    ) -> LossRows:
        """What the loss says of each row. Raises RuntimeError where it does not depend on the head's output."""
        criterion = self.criterion
        if isinstance(criterion, LinearCausalLM):
            return from_features(criterion, seen.output, target, self.gradients)
        if seen.fused:
            assert isinstance(criterion, CrossEntropy)
            return from_logits(criterion, logits_of(seen.returned).detach(), seen.features, target, bias)
        assert seen.read is not None
        hits = criterion.hits(seen.output, target, present)
        at = None
        if self.gradients and seen.features is not None:
            at = seen.captured, seen.features, self.head
        rows = from_losses(seen.read, present, at, bias, hits, keep_graph)
        if at is not None and rows.residual is None:
            raise RuntimeError(
                "the loss does not depend on the head's output: pass head=, the last linear layer; "
                f"{listed_candidates(model)}"
            )
        return rows

    def _at_once(self, seen: _Forward, target: Tensor, bias: bool, factors: bool) -> Scored:
        """Cross-entropy of the head's output with one label a sample, by one operator; see :func:`in_units`."""
        criterion = self.criterion
        assert isinstance(criterion, CrossEntropy)
        logits = logits_of(seen.returned)
        logits = logits.detach() if logits.requires_grad else logits
        z, y, h = _one_a_sample(criterion, logits, seen.features, target)
        options = criterion.options(z.device)
        wanted = "none" if not factors else "both" if saves_launches(z.device) else "residual"
        found = score_minibatch(z, y, h, bias=bias, factors=wanted, **options)
        stats, scale = found.stats, found.scale
        correct, total = found.hits.unbind()
        proxies = None
        if h is not None:
            inputs = h

            def left() -> Tensor:
                if found.residual is not None:
                    return found.residual
                return torch.where(stats.valid[:, None], ops.residual(z, y, stats.lse, **options) * scale, 0.0)

            def right() -> Tensor:
                if found.features is not None:
                    return found.features
                if may_ask(z.device) and inputs.dtype == stats.loss.dtype and total.item() == len(inputs):
                    return inputs  # not copied: that would take as long as the scores
                return torch.where(stats.valid[:, None], inputs.to(stats.loss.dtype), 0.0)

            proxies = HeadProxies(left, right, positions=1, bias=bias, reduce=self.reduce, finite=True)
        return Scored(stats, scale, proxies, hits=(correct, total), mass=found.mass, scaled=found.scaled)


def _one_a_sample(
    criterion: CrossEntropy, logits: Tensor, features: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's output (n, C), the labels (n,) and the head's input (n, d) of samples with one label each."""
    plain = logits.dim() == 2 and target.dim() == 1 and logits.shape[0] == target.shape[0]
    if plain and (features is None or features.dim() == 2):  # nearly always; the long way is a dozen calls
        criterion.check_classes(logits.shape[1], "the model")
        check_classes_of(logits)
        return logits, target, features
    z, y, h = operands(criterion, logits, features, target)
    return z[:, 0], y[:, 0], None if h is None else h[:, 0]


def unscored(batch: Batch, criterion: Criterion, model: nn.Module) -> Scored:
    """What is known without a forward: which samples have a target and are finite."""
    finite = batch.finite()
    first = next((p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()), torch.float32)
    if saves_launches(batch.device) and _has_one_label_each(criterion, batch.target):
        assert isinstance(criterion, CrossEntropy)
        labels, weight = criterion.labels(batch.target)[:, 0], criterion.weight_on(batch.device)
        double = real_dtype(first) == torch.float64
        mass, valid, never, unknown, scale = unscored_rows(labels, finite, weight, criterion.ignore_index, double)
        stats = BatchStatistics(unknown, unknown, unknown, unknown, never, valid)
        return Scored(stats, scale, mass=mass, scaled=unknown, finite=finite)  # NaN in any unit
    mass, present = criterion.mass(batch.target, batch.n, batch.device)
    valid = present & finite
    stats = BatchStatistics.unscored(valid, real_dtype(first))
    return Scored(stats, scale_of(mass, valid), mass=mass, finite=finite)


def may_run(batch: Batch, valid: Tensor, criterion: Criterion) -> Tensor:
    """(n,) bool: the rows that may run as they came. Of the others, floating entries must become 0.

    Batch norm looks at a row that has no target as well, as in an ordinary step. A row that has a target, and is not
    ``valid`` (n,), has shown a NaN.
    """
    _, present = criterion.mass(batch.target, batch.n, batch.device)
    return valid | (batch.finite() & ~present)


def scores_at_once(device: torch.device) -> bool:
    """Whether one operator scores a minibatch of one label a sample on ``device`` in less time than several do."""
    return device.type == "cpu" or saves_launches(device)


def _has_one_label_each(criterion: Criterion, target: Any) -> bool:
    """Whether the loss is the cross-entropy, and the samples have a class each.

    Raises what :meth:`CrossEntropy.labels` raises: before the forward, as the mass does elsewhere.
    """
    if not isinstance(criterion, CrossEntropy) or criterion.soft(target):
        return False
    plain = isinstance(target, Tensor) and target.dtype == torch.int64 and target.dim() == 1 and not criterion.shift
    return plain or criterion.labels(target).shape[1] == 1


def _is_head_output(output: Any, logits: Tensor) -> bool:
    """Whether the model returns what the head gave, up to a reshape of the leading dimensions."""
    returned = logits_of(output)
    return returned is logits or (
        returned.data_ptr() == logits.data_ptr()
        and returned.numel() == logits.numel()
        and returned.shape[-1] == logits.shape[-1]
        and returned.is_contiguous()
        and logits.is_contiguous()
    )
