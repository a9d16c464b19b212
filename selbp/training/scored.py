"""What is known of the samples before the rule chooses: their statistics, and proxies of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.proxies import DIAGNOSTIC_BYTES, HeadProxies, sequence_norm_sq
from selbp.reference.losses import scale_of
from selbp.training.head_kinds import weight_shape
from selbp.training.linear_proxies import StreamedProxies
from selbp.training.loss_rows import LossRows
from selbp.training.sketched import Sketcher
from selbp.types import BatchStatistics

Reduce = Callable[[Tensor], Tensor]  # averages over ranks


@dataclass(slots=True)
class Scored:
    """What the scoring forward found, or what is known without one."""

    stats: BatchStatistics  # loss as the criterion gives it, comparable between minibatches; residual_sq scaled by s^2
    scale: Tensor  # () s = n / total mass of the valid samples
    proxies: HeadProxies | None = None
    trains: Tensor | None = None  # (n,) losses, or the logits (n, ..., C) for them; None unless their graph is kept
    hits: tuple[Tensor, Tensor] | None = None  # () correct entries and () all entries, for a loss with classes
    auxiliary: Tensor | None = None  # () the model's own further loss, of all n rows
    mass: Tensor | None = None  # (n,) what each sample counts in torch's mean: its targets, or their class weights
    output: Any = None  # the model's, where it was to be kept
    scaled: Tensor | None = None  # (n,) stats.loss times the scale, where that came with it
    finite: Tensor | None = None  # (n,) bool: whether inputs and target are finite; None where nobody looked


def in_units(
    rows: LossRows,
    mass: Tensor,
    bias: bool,
    gradients: bool,
    reduce: Reduce | None,
    sketch: Sketcher | None,
    unit: Tensor | None,
) -> Scored:
    """Scale the gradients by s, to the units of torch's mean; 0 for a sample that is not valid. Losses stay unscaled.

    s depends on the minibatch's class weights and valid targets. A rule may compare a loss with losses of other
    minibatches, or with one known beforehand, so losses must not contain s.
    """
    valid, residual, feature_sq = rows.valid, rows.residual, rows.feature_sq
    scale = (scale_of(mass, valid) if unit is None else unit).to(rows.loss.dtype)
    proxies = None
    if residual is not None and rows.features is not None:
        h, of_positions, live = rows.features, residual, valid[:, None, None]
        shape, positions = h.shape[:2], rows.predicted

        def left() -> Tensor:
            return torch.where(live, of_positions(slice(None)).view(*shape, -1)[:, :positions] * scale, 0.0)

        def right() -> Tensor:
            return torch.where(live, h[:, :positions].to(rows.loss.dtype), 0.0)

        if sketch is not None and positions > 1:
            proxies = _of_sketches(sketch(residual, rows.classes, h.to(rows.loss.dtype), bias), scale, valid, reduce)
        else:
            proxies = HeadProxies(left, right, positions=positions, bias=bias, reduce=reduce)
        if gradients and positions > 1:  # a sum over positions: its norm needs the factors of every position
            exact = sequence_norm_sq(proxies.token_residual, proxies.token_features, bias=proxies.bias)
            feature_sq = exact / (rows.residual_sq * scale.square()).clamp(min=1e-30)
    if rows.streamed is not None:
        if sketch is not None and rows.streamed.labels.shape[1] > 1:
            proxies = _of_sketches(sketch.of_head(rows.streamed), scale, valid, reduce)
            norm_sq = proxies.token_residual.square().sum((1, 2))
        else:
            proxies = streamed = StreamedProxies(rows.streamed, scale, valid, reduce=reduce)
            norm_sq = streamed.norm_sq()
        feature_sq = norm_sq / (rows.residual_sq * scale.square()).clamp(min=1e-30)
    stats = BatchStatistics(rows.loss, rows.lse, rows.residual_sq * scale.square(), feature_sq, rows.correct, valid)
    return Scored(stats, scale, proxies, hits=rows.hits, mass=mass)


def _of_sketches(sketches: Tensor, scale: Tensor, valid: Tensor, reduce: Reduce | None) -> HeadProxies:
    """Proxies whose gradients are the ``sketches`` (n, p q) in the units of torch's mean, 0 where not ``valid``."""
    made = torch.where(valid[:, None], sketches * scale, 0.0)[:, None]
    return HeadProxies(lambda: made, lambda: made.new_ones(len(made), 1, 1), positions=1, bias=False, reduce=reduce)


def worth_keeping(proxies: HeadProxies | None, head: nn.Module | None, n: int) -> HeadProxies | None:
    """The proxies for the report's figures, unless that would keep large factors alive during the backward.

    None also where the rule has not read the mean of all ranks: the figures may be read on one rank alone.
    """
    if proxies is None or head is None or proxies.unmet:
        return None
    if proxies.complete:
        proxies.release()
        return proxies
    factors = n * proxies.positions * sum(weight_shape(head) or ())
    return proxies if 4 * factors <= DIAGNOSTIC_BYTES else None
