"""The scoring forward: statistics and gradient proxies of all n samples.

Cross-entropy of the head's own output goes through the fused operator. Every other loss, and a model that does more
to its logits before it returns them, gets its residual from autograd at the head's output, cut off from the layers
below.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from selbp import ops
from selbp.common.batch import Batch
from selbp.common.distributed import inner_outputs
from selbp.common.guards import evaluating, scoring_autocast, without_autocast, without_autocast_cache
from selbp.common.proxies import DIAGNOSTIC_BYTES, HeadProxies, sequence_norm_sq
from selbp.ops._backends import saves_launches
from selbp.ops.minibatch import unscored as unscored_rows
from selbp.ops.score_minibatch import score_minibatch
from selbp.reference.losses import scale_of
from selbp.training.head import Captured, capture, listed_candidates
from selbp.training.head_kinds import is_pointwise, positions_last
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.linear_proxies import HeadFactors, StreamedProxies
from selbp.training.losses import Criterion, CrossEntropy, logits_of
from selbp.training.sketched import Sketcher
from selbp.types import BatchStatistics, real_dtype


@dataclass(frozen=True)
class Scored:
    """What the scoring forward found."""

    stats: BatchStatistics  # loss as the criterion gives it, comparable between minibatches; residual_sq scaled by s^2
    scale: Tensor  # () s = n / total mass of the valid samples
    proxies: HeadProxies | None
    losses: Tensor | None  # (n,) unscaled, with their graph, where the forward recorded one
    hits: tuple[Tensor, Tensor] | None  # () correct entries and () all entries, for a loss with classes
    auxiliary: Tensor | None = None  # () the model's own further loss, of all n rows, where a graph is kept
    mass: Tensor | None = None  # (n,) what each sample counts in torch's mean: its targets, or their class weights
    output: Any = None  # the model's, where it was to be kept
    scaled: Tensor | None = None  # (n,) stats.loss times the scale, where that came with it


class _Rows(NamedTuple):
    """What the loss says of n samples, unscaled."""

    loss: Tensor  # (n,)
    lse: Tensor  # (n,)
    residual_sq: Tensor  # (n,) summed over positions
    feature_sq: Tensor  # (n,) averaged over positions with weights residual_sq
    correct: Tensor  # (n,)
    valid: Tensor  # (n,)
    residual: Callable[[], Tensor] | None  # () -> (n, T, C)
    features: Tensor | None  # (n, T, d)
    hits: tuple[Tensor, Tensor] | None
    streamed: HeadFactors | None = None  # of a head whose logits are not stored, in place of residual and features


def score(
    batch: Batch,
    model: nn.Module,
    head: nn.Module | None,
    criterion: Criterion,
    *,
    gradients: bool,
    factors: bool = True,
    mode: Literal["same", "eval"],
    precision: str = "same",
    keep_graph: bool,
    reduce: Callable[[Tensor], Tensor] | None = None,
    feed: Callable[[Batch, nn.Module], Any] = Batch.feed,
    keep_output: bool = False,
    auxiliary: Callable[[Any], Tensor | None] = lambda output: None,
    sketch: Sketcher | None = None,
    unit: Tensor | None = None,
    ran: Callable[[], None] = lambda: None,
) -> Scored:
    """Run the forward on all rows; with ``gradients``, read gradient norms and proxies as well as losses.

    ``factors`` says that the rule will read the proxies. ``precision`` is the forward's, see
    :func:`scoring_autocast`. ``keep_graph`` records the forward for a backward through chosen rows of it; else
    nothing is recorded below the head. ``reduce`` averages the mean gradient over ranks. ``feed`` calls the model.
    ``keep_output`` hands on what it gave. ``auxiliary`` reads a further loss off it. ``sketch`` stands for the exact
    gradients of samples with several positions. ``unit`` () is the scale, in place of this batch's own: 1 where it is
    a part of a minibatch. ``ran`` is called after the forward and the losses, before scoring.
    """
    at_once = unit is None and _has_one_label_each(criterion, batch)
    known = None if at_once else criterion.mass(batch.target, batch.n, batch.device)
    linear = isinstance(criterion, LinearCausalLM)  # then the model returns the head's input
    leaf = gradients and not keep_graph
    with evaluating(model, batch.device) if mode == "eval" else nullcontext():
        with nullcontext() if keep_graph else without_autocast_cache(), scoring_autocast(batch.device, precision):
            watch = capture(None if linear else head, leaf=leaf, optional=not gradients)
            whole = inner_outputs(model, trains=keep_graph)
            with torch.set_grad_enabled(keep_graph), watch as captured, whole as inner:
                output = feed(batch, model)
    returned = inner[-1] if inner else output  # in whose graph gradients may be read
    seen = (
        head is not None and not linear and (gradients or captured.calls == 1)
    )  # a rule that reads losses does without
    features, logits = captured.check(model) if seen else (None, None)
    features = None if features is None else positions_last(head, features)
    edited = captured.edited  # then the loss reads other logits than the head gave
    convolution = head is not None and is_pointwise(head)
    fused = (isinstance(criterion, CrossEntropy) and not criterion.soft(batch.target)) and (
        logits is None
        or (
            not (edited or convolution)
            and _is_head_output(returned, logits)
            and criterion.classes_last(logits_of(output), batch.target)
        )
    )
    beside = auxiliary(output) if keep_graph else None  # here, where a gradient is recorded
    losses = read = None
    if keep_graph or not (fused or linear):
        with torch.set_grad_enabled(keep_graph or gradients):
            losses = read = criterion.losses(output, batch.target, batch.n)
            if inner and gradients and not (fused or linear):
                read = criterion.losses(returned, batch.target, batch.n)
    ran()
    with torch.no_grad(), without_autocast(batch.device):
        bias = getattr(head, "bias", None) is not None
        if fused and known is None:
            assert isinstance(criterion, CrossEntropy)
            z = logits_of(returned).detach()
            scored = _at_once(criterion, z, features, batch.target, bias, factors, reduce)
            scored = replace(scored, losses=losses if keep_graph else None, auxiliary=beside)
            return replace(scored, output=output) if keep_output else scored
        mass, present = known or criterion.mass(batch.target, batch.n, batch.device)
        if isinstance(criterion, LinearCausalLM):
            rows = _from_features(criterion, output, batch.target, gradients)
        elif fused:
            assert isinstance(criterion, CrossEntropy)
            rows = _from_logits(criterion, logits_of(returned).detach(), features, batch.target, bias)
        else:
            assert read is not None
            hits = criterion.hits(output, batch.target, present)
            at = (captured, features, head) if gradients and features is not None else None
            rows = _from_losses(read, present, at, bias, hits, keep_graph)
            if at is not None and rows.residual is None:
                raise RuntimeError(
                    "the loss does not depend on the head's output: pass head=, the last linear layer; "
                    f"{listed_candidates(model)}"
                )
        scored = _scaled(rows, mass, bias, gradients, reduce, losses if keep_graph else None, beside, sketch, unit)
        return replace(scored, output=output) if keep_output else scored


def _has_one_label_each(criterion: Criterion, batch: Batch) -> bool:
    """Whether the samples have a class each and are where one operator scores them in fewer launches.

    Raises what :meth:`CrossEntropy.labels` raises: before the forward, as the mass does elsewhere.
    """
    if not (saves_launches(batch.device) and isinstance(criterion, CrossEntropy)) or criterion.soft(batch.target):
        return False
    return criterion.labels(batch.target).shape[1] == 1


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


def _operands(
    criterion: CrossEntropy, logits: Tensor, features: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits (n, T, C) and the head's input (n, T, d), the entries that predict the labels (n, T)."""
    z = criterion.tokens(logits, target)
    criterion.check_classes(z.shape[-1], "the model")
    h = None if features is None else criterion.positions(features.reshape(*logits.shape[:-1], -1), target)
    return z, h


def _at_once(
    criterion: CrossEntropy,
    logits: Tensor,
    features: Tensor | None,
    target: Tensor,
    bias: bool,
    factors: bool,
    reduce: Callable[[Tensor], Tensor] | None,
) -> Scored:
    """Cross-entropy of the head's output with one label a sample, by one operator; see :func:`_scaled`."""
    z, h = _operands(criterion, logits, features, target)
    z, y, h = z[:, 0], criterion.labels(target)[:, 0], None if h is None else h[:, 0]
    options: dict[str, Any] = dict(
        class_weight=criterion.weight_on(z.device),
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )
    found = score_minibatch(z, y, h, bias=bias, factors=factors, **options)
    stats, scale = found.stats, found.scale
    proxies = None
    if h is not None:
        live, inputs = stats.valid[:, None], h

        def left() -> Tensor:
            if found.residual is not None:
                return found.residual[:, None]
            return torch.where(live, ops.residual(z, y, stats.lse, **options) * scale, 0.0)[:, None]

        def right() -> Tensor:
            if found.features is not None:
                return found.features[:, None]
            return torch.where(live, inputs.to(stats.loss.dtype), 0.0)[:, None]

        proxies = HeadProxies(left, right, positions=1, bias=bias, reduce=reduce, finite=True)
    return Scored(stats, scale, proxies, None, (found.hits[0], found.hits[1]), None, found.mass, scaled=found.scaled)


def _from_logits(criterion: CrossEntropy, logits: Tensor, features: Tensor | None, target: Tensor, bias: bool) -> _Rows:
    """Cross-entropy of the head's output, by the fused operator over all tokens."""
    z, h = _operands(criterion, logits, features, target)
    n, length, _ = z.shape
    y, flat = criterion.labels(target).reshape(-1), z.flatten(0, 1)
    options: dict[str, Any] = dict(
        class_weight=criterion.weight_on(z.device),
        ignore_index=criterion.ignore_index,
        label_smoothing=criterion.label_smoothing,
    )
    tokens = ops.cross_entropy_statistics(flat, y, None if h is None else h.flatten(0, 1), bias=bias, **options)
    ignored = y == criterion.ignore_index

    def residual() -> Tensor:
        return ops.residual(flat, y, tokens.lse, **options).view(z.shape)

    hits = tokens.correct.sum(), tokens.valid.sum()
    return _Rows(*_by_sample(tokens, ignored, n, length), residual, h, hits)


def _by_sample(tokens: BatchStatistics, ignored: Tensor, n: int, length: int) -> BatchStatistics:
    """The statistics of n samples, of those of their (n length,) tokens."""
    if length == 1:
        return tokens
    shape = (n, length)
    loss, lse = tokens.loss.view(shape).sum(1), tokens.lse.view(shape).mean(1)
    residual_sq = tokens.residual_sq.view(shape).sum(1)
    feature_sq = (tokens.residual_sq * tokens.feature_sq).view(shape).sum(1) / residual_sq.clamp(min=1e-30)
    valid = tokens.valid.view(shape).any(1) & (tokens.valid | ignored).view(shape).all(1)
    correct = valid & (tokens.correct | ignored).view(shape).all(1)
    return BatchStatistics(loss, lse, residual_sq, feature_sq, correct, valid)


def _from_features(criterion: LinearCausalLM, output: Any, target: Tensor, gradients: bool) -> _Rows:
    """Cross-entropy of the head's input and weight, without the logits."""
    found, y = criterion.by_token(output, target), criterion.tokens.labels(target)
    stats, (n, length) = found.stats, y.shape
    hits = stats.correct.sum(), stats.valid.sum()
    rows = _by_sample(stats, y.reshape(-1) == criterion.tokens.ignore_index, n, length)
    if not gradients:
        return _Rows(*rows, None, None, hits)
    weight = criterion.tokens.weight_on(y.device)
    smoothing = criterion.tokens.label_smoothing
    factors = HeadFactors(*criterion.operands(found.features), y, stats.lse, stats.valid, weight, smoothing)
    return _Rows(*rows, None, None, hits, factors)


def _from_losses(
    losses: Tensor,
    present: Tensor,
    at: tuple[Captured, Tensor, nn.Module | None] | None,  # the head's output and input, and the head
    bias: bool,
    hits: tuple[Tensor, Tensor] | None,
    keep_graph: bool,
) -> _Rows:
    """Any loss: the residual is its gradient with respect to the head's output, where that is given and matters."""
    loss, n = losses.detach(), len(losses)
    unknown = torch.full_like(loss, torch.nan)
    valid, never = present & torch.isfinite(loss), torch.zeros_like(present)
    without = _Rows(loss, unknown, unknown, unknown, never, valid, None, None, hits)
    if at is None:
        return without
    captured, features, head = at
    if captured.logits is not None and len(captured.logits) % n:
        shape = tuple(captured.logits.shape)
        raise RuntimeError(f"the head's output must have the samples first, {n} of them: got {shape}")
    gradient = None
    if losses.requires_grad and captured.edge is not None:
        ones = torch.ones_like(losses)
        gradient = torch.autograd.grad(losses, captured.edge, ones, retain_graph=keep_graph, allow_unused=True)[0]
    if gradient is None:
        return without
    gradient = positions_last(head, gradient)
    residual = gradient.to(loss.dtype).reshape(n, -1, gradient.shape[-1])
    h = features.reshape(n, -1, features.shape[-1])
    squares = residual.square().sum(2)
    residual_sq, h_sq = squares.sum(1), h.to(loss.dtype).square().sum(2) + float(bias)
    feature_sq = h_sq[:, 0] if h.shape[1] == 1 else (squares * h_sq).sum(1) / residual_sq.clamp(min=1e-30)
    valid = valid & torch.isfinite(residual_sq) & torch.isfinite(feature_sq)
    return _Rows(loss, unknown, residual_sq, feature_sq, never, valid, lambda: residual, h, hits)


def _scaled(
    rows: _Rows,
    mass: Tensor,
    bias: bool,
    gradients: bool,
    reduce: Callable[[Tensor], Tensor] | None,
    losses: Tensor | None,
    auxiliary: Tensor | None,
    sketch: Sketcher | None,
    unit: Tensor | None,
) -> Scored:
    """Gradients in the units of torch's mean, 0 for a sample that is not valid; losses stay as they are.

    s differs between minibatches with their class weights and valid targets, and a rule may compare a loss with those
    of other minibatches or with one known beforehand.
    """
    valid, residual, feature_sq = rows.valid, rows.residual, rows.feature_sq
    scale = (scale_of(mass, valid) if unit is None else unit).to(rows.loss.dtype)
    proxies = None
    if residual is not None and rows.features is not None:
        compute, live = residual, valid[:, None, None]
        h = rows.features

        def left() -> Tensor:
            return torch.where(live, compute() * scale, 0.0)

        def right() -> Tensor:
            return torch.where(live, h.to(rows.loss.dtype), 0.0)

        if sketch is not None and h.shape[1] > 1:
            made = sketch(left(), right(), bias)[:, None]
            proxies = _of_sketches(made, reduce)
        else:
            proxies = HeadProxies(left, right, positions=h.shape[1], bias=bias, reduce=reduce)
        if gradients and h.shape[1] > 1:  # a sum over positions: its norm needs the factors of every position
            exact = sequence_norm_sq(proxies.token_residual, proxies.token_features, bias=proxies.bias)
            feature_sq = exact / (rows.residual_sq * scale.square()).clamp(min=1e-30)
    if rows.streamed is not None:
        if sketch is not None and rows.streamed.labels.shape[1] > 1:
            made = torch.where(valid[:, None], sketch.of_head(rows.streamed) * scale, 0.0)[:, None]
            proxies = _of_sketches(made, reduce)
            norm_sq = made.square().sum((1, 2))
        else:
            proxies = streamed = StreamedProxies(rows.streamed, scale, valid, reduce=reduce)
            norm_sq = streamed.norm_sq()
        feature_sq = norm_sq / (rows.residual_sq * scale.square()).clamp(min=1e-30)
    stats = BatchStatistics(rows.loss, rows.lse, rows.residual_sq * scale.square(), feature_sq, rows.correct, valid)
    return Scored(stats, scale, proxies, losses, rows.hits, auxiliary, mass)


def _of_sketches(made: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> HeadProxies:
    """Proxies whose gradients are the sketches (n, 1, p q)."""
    return HeadProxies(lambda: made, lambda: made.new_ones(len(made), 1, 1), positions=1, bias=False, reduce=reduce)


def unscored(batch: Batch, criterion: Criterion, model: nn.Module) -> Scored:
    """What is known without a forward: which samples have a target and are finite."""
    first = next((p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()), torch.float32)
    if _has_one_label_each(criterion, batch):
        assert isinstance(criterion, CrossEntropy)
        labels, weight = criterion.labels(batch.target)[:, 0], criterion.weight_on(batch.device)
        double = real_dtype(first) == torch.float64
        mass, valid, never, unknown, scale = unscored_rows(
            labels, batch.finite(), weight, criterion.ignore_index, double
        )
        stats = BatchStatistics(unknown, unknown, unknown, unknown, never, valid)
        return Scored(stats, scale, None, None, None, mass=mass, scaled=unknown)  # NaN in any unit
    mass, present = criterion.mass(batch.target, batch.n, batch.device)
    valid = present & batch.finite()
    stats = BatchStatistics.unscored(valid, real_dtype(first))
    return Scored(stats, scale_of(mass, valid), None, None, None, mass=mass)


def worth_keeping(proxies: HeadProxies | None, head: nn.Module | None, n: int) -> HeadProxies | None:
    """The proxies for the report's figures, unless that would keep large factors alive during the backward."""
    if proxies is None or head is None:
        return None
    if proxies.complete:
        proxies.release()
        return proxies
    weight = getattr(head, "weight", None)
    factors = n * proxies.positions * sum(weight.shape) if isinstance(weight, Tensor) else 0
    return proxies if 4 * factors <= DIAGNOSTIC_BYTES else None
