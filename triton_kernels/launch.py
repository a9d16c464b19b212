"""The launches behind the operators, in order: what a CUDA implementation in ``selbp.ops`` calls.

    stored logits        stored_rows; of many classes target_logit (gather) -> logits_statistics -> finalize
    a minibatch          stored_rows -> in_units
    features and weight  target_logit (product) -> statistics       -> finalize

Inputs may have any strides: a matrix whose last dimension is not contiguous is copied once. Outputs are float32 and
bool. Nothing is synchronised and nothing depends on data, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import linear_cross_entropy as head
from . import minibatch, skipped
from . import residual as residual_kernels
from . import stored_rows as stored
from .combine import finalize
from .gram import gram
from .mean import MOST, finite_rows
from .mean import mean_gradient as mean_of
from .sketch import projected_residuals
from .statistics import logits_statistics, statistics
from .target_logit import target_logit

if TYPE_CHECKING:
    from selbp.ops._loss_options import LossOptions

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
FLAGGED = 1 << 22  # entries of both factors up to which looking at all of them costs less than a launch


def rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and do not overlap, else one copy."""
    plain = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if plain or matrix.numel() == 0 else matrix.contiguous()


def contiguous(options: LossOptions) -> LossOptions:
    """The options with contiguous class weights."""
    if options.class_weight is None:
        return options
    return options._replace(class_weight=options.class_weight.contiguous())


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None,  # (n, d)
    options: LossOptions,
    bias: bool,
) -> Statistics:
    """The fields of BatchStatistics from stored logits."""
    logits, target = rows(logits), target.contiguous()
    options = contiguous(options)
    features = None if features is None else rows(features)
    with torch.cuda.device_of(logits):
        if logits.shape[1] <= stored.MOST_CLASSES:
            loss, lse, residual_sq, feature_sq, correct, valid = stored.stored_rows(
                logits, target, features, plus=float(bias), **options._asdict()
            )
            return loss, lse, residual_sq, feature_sq, correct, valid
        z, feature_sq = target_logit(target, logits.shape[1], features=features, logits=logits, plus=float(bias))
        partials = logits_statistics(
            logits,
            target,
            class_weight=options.class_weight,
            smooth=options.label_smoothing != 0.0,
            softcap=options.softcap,
        )
        loss, lse, residual_sq, _, correct, valid = finalize(
            partials, z, feature_sq, target, logits.shape[1], **options._asdict()
        )
    return loss, lse, residual_sq, feature_sq, correct, valid


def fits_minibatch(logits: Tensor) -> bool:
    """Whether :func:`score_minibatch` takes these logits (n, C)."""
    return logits.shape[0] <= stored.MOST_ROWS and logits.shape[1] <= stored.MOST_CLASSES


def score_minibatch(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: bool
) -> tuple[Tensor, ...]:
    """The outputs of ``selbp::score_minibatch``; without ``factors`` the last two hold nothing."""
    logits, target = rows(logits), target.contiguous()
    features = None if features is None else rows(features)
    options = contiguous(options)
    with torch.cuda.device_of(logits):
        loss, lse, residual_sq, feature_sq, correct, valid, mass, residual, h = stored.stored_rows(
            logits, target, features, plus=float(bias), mass=True, factors=factors, **options._asdict()
        )
        scale, hits, scaled, residual_sq = stored.in_units(mass, valid, correct, loss, residual_sq, residual)
    return loss, lse, residual_sq, feature_sq, correct, valid, mass, scaled, scale, hits, residual, h


def linear_cross_entropy(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,) int64
    options: LossOptions,
    share_of: int = 0,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The fields of BatchStatistics of ``features @ weight.T + bias``, which is never stored, then 1 - p_y.

    Beside them the shares of tiles of ``share_of`` classes, see :func:`.statistics.statistics`.
    """
    features, weight, target = rows(features), rows(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    options = contiguous(options)
    with torch.cuda.device_of(features):
        z, feature_sq = target_logit(
            target, len(weight), features=features, weight=weight, bias=bias, plus=float(bias is not None)
        )
        partials, shares = statistics(
            features,
            weight,
            bias,
            target,
            class_weight=options.class_weight,
            smooth=options.label_smoothing != 0.0,
            softcap=options.softcap,
            share_of=share_of,
        )
        loss, lse, residual_sq, p_rest, correct, valid = finalize(
            partials, z, feature_sq, target, len(weight), **options._asdict()
        )
    return (loss, lse, residual_sq, feature_sq, correct, valid, p_rest), shares


def linear_cross_entropy_statistics(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
) -> Statistics:
    """The fields of BatchStatistics; arguments as for :func:`linear_cross_entropy`."""
    (loss, lse, residual_sq, feature_sq, correct, valid, _), _ = linear_cross_entropy(
        features, weight, bias, target, options
    )
    return loss, lse, residual_sq, feature_sq, correct, valid


def linear_cross_entropy_backward(
    scale: Tensor,  # (k,)
    operands: tuple[Tensor, Tensor, Tensor | None],  # features (k, d), weight (C, d), bias (C,)
    scored: tuple[Tensor, Tensor, Tensor],  # target, lse and 1 - p_y, (k,) each
    options: LossOptions,
    needs: tuple[bool, bool, bool],  # of features, weight, bias
    left_out: Tensor | None = None,  # (k, tiles) probability of the tiles that are left out, negative elsewhere
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the rows given; see :func:`.linear_cross_entropy.backward` and :func:`.skipped.backward`."""
    (features, weight, bias), (need_features, need_weight, need_bias) = operands, needs
    class_weight, _, label_smoothing, softcap = contiguous(options)
    inputs = scale, rows(features), rows(weight), None if bias is None else bias.contiguous(), *scored, class_weight
    with torch.cuda.device_of(features):
        if left_out is not None:
            return skipped.backward(
                *inputs,
                left_out,
                softcap=softcap,
                need_features=need_features,
                need_weight=need_weight,
                need_bias=need_bias,
            )
        return head.backward(
            *inputs,
            label_smoothing=label_smoothing,
            softcap=softcap,
            need_features=need_features,
            need_weight=need_weight,
            need_bias=need_bias,
        )


def sketch(
    features: Tensor,  # (n, T, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n, T) int64
    left: Tensor,  # (C, p)
    right: Tensor,  # (d, q), or (d + 1, q) with a bias
    options: LossOptions,
) -> Tensor:
    """(n, p, q) float32 sketches of the sequences' head gradients."""
    n, length, d = features.shape
    h, y = rows(features.reshape(n * length, d)), target.reshape(n * length).contiguous()
    with torch.cuda.device_of(features):
        projected, valid = projected_residuals(
            h, rows(weight), None if bias is None else bias.contiguous(), y, left, **contiguous(options)._asdict()
        )
    h = torch.where(valid[:, None], h, 0.0)
    mapped = h.float() @ right[:d].float()
    if bias is not None:
        mapped = mapped + right[d].float()
    return torch.bmm(projected.view(n, length, -1).transpose(1, 2), mapped.view(n, length, -1))


def residual(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    options: LossOptions,
) -> Tensor:
    """(n, C) float32 gradient of each row's loss with respect to its logits."""
    with torch.cuda.device_of(logits):
        return residual_kernels.residual(
            rows(logits), target.contiguous(), lse.contiguous(), **contiguous(options)._asdict()
        )


def rows_are_finite(x: Tensor) -> Tensor:
    """(n,) bool: every entry of the row of x (n, m) is finite."""
    x = rows(x)
    with torch.cuda.device_of(x):
        return finite_rows(x, x[:, :0]).view(torch.bool)


def unscored(
    target: Tensor, finite: Tensor, class_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The outputs of ``selbp::unscored``, of at most MOST_ROWS rows."""
    class_weight = None if class_weight is None else class_weight.contiguous()
    with torch.cuda.device_of(target):
        return minibatch.unscored(target.contiguous(), finite.contiguous(), class_weight, ignore_index)


def hits(logits: Tensor, target: Tensor, live: Tensor, ignore_index: int) -> Tensor:
    """The output of ``selbp::count_hits``, of at most MOST_LOGITS logits."""
    with torch.cuda.device_of(logits):
        return minibatch.hits(rows(logits), target.contiguous(), live.contiguous(), ignore_index)


def weighted_sum(losses: Tensor, scale: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``selbp::weighted_loss`` for contiguous float32 losses."""
    with torch.cuda.device_of(losses):
        return minibatch.weighted_sum(losses, scale, weights.contiguous())


def finite_flags(residual: Tensor, features: Tensor) -> Tensor | bool:
    """(n,) uint8 flags of the rows that are finite; False where looking at them would cost more than it saves."""
    residual, features = rows(residual), rows(features)
    if not 0 < len(residual) * (residual.shape[1] + features.shape[1]) <= FLAGGED:
        return False
    with torch.cuda.device_of(residual):
        return finite_rows(residual, features)


def gradient_gram(residual: Tensor, features: Tensor, bias: bool, finite: Tensor | bool = False) -> Tensor:
    """(n, n) float32 inner products of the per-sample gradients.

    ``finite``: :func:`finite_flags`, or whether every row is known to be finite.
    """
    residual, features = rows(residual), rows(features)
    with torch.cuda.device_of(residual):
        finite = finite if finite is not False else finite_flags(residual, features)
        return gram(residual, features, bias=bias, finite=finite)


def mean_gradient(
    residual: Tensor, features: Tensor, bias: bool, finite: Tensor | bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Inner (n,), target_sq (), M (C, d) and the bias's column in float32; None for more than a small minibatch."""
    if not 0 < len(residual) * residual.shape[1] * max(features.shape[1], 1) <= MOST:
        return None
    residual, features = rows(residual), rows(features)
    with torch.cuda.device_of(residual):
        if finite is False:
            finite = finite_rows(residual, features)
        return mean_of(residual, features, None if finite is True else finite, bias=bias)
