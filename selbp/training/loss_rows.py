"""The loss, gradient norm and correctness of each sample of a forward, unscaled.

Cross-entropy of the head's own output goes through the fused operator. Every other loss, and a model that does more
to its logits before it returns them, gets its residual from autograd at the head's output, cut off from the layers
below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selbp import ops
from selbp.training.head import Captured
from selbp.training.head_kinds import positions_last
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.linear_proxies import HeadFactors
from selbp.training.losses import CrossEntropy
from selbp.types import BatchStatistics


class LossRows(NamedTuple):
    """What the loss says of n samples, unscaled."""

    loss: Tensor  # (n,)
    lse: Tensor  # (n,)
    residual_sq: Tensor  # (n,) summed over positions
    feature_sq: Tensor  # (n,) averaged over positions with weights residual_sq
    correct: Tensor  # (n,)
    valid: Tensor  # (n,)
    residual: Callable[[slice], Tensor] | None  # (t, C) of some of the n T positions
    features: Tensor | None  # (n, T, d)
    hits: tuple[Tensor, Tensor] | None
    classes: int = 0  # of residual
    predicted: int = 0  # positions that may have a label: the first ones
    streamed: HeadFactors | None = None  # of a head whose logits are not stored, in place of residual and features


def operands(
    criterion: CrossEntropy, logits: Tensor, features: Tensor | None, target: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's output (n, T, C), the labels (n, T) that it predicts, and its input (n, T, d)."""
    z, y = criterion.pairs(logits, target)
    criterion.check_classes(z.shape[-1], "the model")
    return z, y, None if features is None else features.reshape(*y.shape, features.shape[-1])


def from_logits(
    criterion: CrossEntropy, logits: Tensor, features: Tensor | None, target: Tensor, bias: bool
) -> LossRows:
    """Cross-entropy of the head's output, by the fused operator over all tokens."""
    z, y, h = operands(criterion, logits, features, target)
    flat, labels = z.flatten(0, 1), y.reshape(-1)
    options = criterion.options(z.device)
    tokens = ops.cross_entropy_statistics(flat, labels, None if h is None else h.flatten(0, 1), bias=bias, **options)

    def residual(part: slice) -> Tensor:
        return ops.residual(flat[part], labels[part], tokens.lse[part], **options)

    hits = tokens.correct.sum(), tokens.valid.sum()
    predicted = target.shape[1] - 1 if criterion.shift else y.shape[1]
    rows = _by_sample(tokens, y == criterion.ignore_index, predicted)
    return LossRows(*rows, residual, h, hits, z.shape[2], predicted)


def _by_sample(tokens: BatchStatistics, ignored: Tensor, predicted: int) -> BatchStatistics:
    """The statistics of n samples, of those of their tokens; ``ignored`` is (n, T), T >= ``predicted``.

    A NaN at a token with an ignored label spoils the sample's gradient, as 0 * NaN: the sample is not valid.
    """
    if predicted == ignored.shape[1] == 1:
        return tokens
    shape = ignored.shape
    loss, lse = tokens.loss.view(shape).sum(1), tokens.lse.view(shape)[:, :predicted].mean(1)
    residual_sq = tokens.residual_sq.view(shape).sum(1)
    feature_sq = (tokens.residual_sq * tokens.feature_sq).view(shape).sum(1) / residual_sq.clamp(min=1e-30)
    valid = tokens.valid.view(shape).any(1) & (tokens.valid.view(shape) | ignored).all(1)
    valid = valid & torch.isfinite(lse) & torch.isfinite(feature_sq)
    correct = valid & (tokens.correct.view(shape) | ignored).all(1)
    return BatchStatistics(loss, lse, residual_sq, feature_sq, correct, valid)


def from_features(criterion: LinearCausalLM, output: Any, target: Tensor, gradients: bool) -> LossRows:
    """Cross-entropy of the head's input and weight, without the logits."""
    found, y = criterion.by_token(output, target), criterion.tokens.labels(target)
    stats = found.stats
    hits = stats.correct.sum(), stats.valid.sum()
    rows = _by_sample(stats, y == criterion.tokens.ignore_index, y.shape[1])
    if not gradients:
        return LossRows(*rows, None, None, hits)
    weight = criterion.tokens.weight_on(y.device)
    smoothing = criterion.tokens.label_smoothing
    factors = HeadFactors(*criterion.operands(found.features), y, stats.lse, stats.valid, weight, smoothing)
    return LossRows(*rows, None, None, hits, streamed=factors)


def from_losses(
    losses: Tensor,
    present: Tensor,
    at: tuple[Captured, Tensor, nn.Module | None] | None,  # the head's output and input, and the head
    bias: bool,
    hits: tuple[Tensor, Tensor] | None,
    keep_graph: bool,
) -> LossRows:
    """Any loss: the residual is its gradient with respect to the head's output, where that is given and matters."""
    loss, n = losses.detach(), len(losses)
    unknown = torch.full_like(loss, torch.nan)
    valid, never = present & torch.isfinite(loss), torch.zeros_like(present)
    without = LossRows(loss, unknown, unknown, unknown, never, valid, None, None, hits)
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
    flat = residual.flatten(0, 1)
    sizes = flat.shape[1], h.shape[1]
    return LossRows(loss, unknown, residual_sq, feature_sq, never, valid, lambda part: flat[part], h, hits, *sizes)
