"""The launches behind the operators, in order: what a CUDA implementation in ``selbp.ops`` calls.

    stored logits        target_logit (gather) -> logits_statistics -> finalize
    features and weight  target_logit (product) -> statistics       -> finalize

Inputs may have any strides: a matrix whose last dimension is not contiguous is copied once. Outputs are float32 and
bool. Nothing is synchronised and nothing depends on data, so every call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import linear_cross_entropy as head
from . import residual as residual_kernels
from .finalize import finalize
from .gram import gram
from .sketch import projected_residuals
from .statistics import logits_statistics, statistics
from .target_logit import target_logit

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous and do not overlap, else one copy."""
    plain = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if plain or matrix.numel() == 0 else matrix.contiguous()


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None,  # (n, d)
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    bias: bool,
) -> Statistics:
    """The fields of BatchStatistics from stored logits."""
    logits, target = rows(logits), target.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    with torch.cuda.device_of(logits):
        z, feature_sq = target_logit(
            target, logits.shape[1], features=None if features is None else rows(features), logits=logits,
            plus=float(bias),
        )  # fmt: skip
        partials = logits_statistics(
            logits, target, class_weight=class_weight, smooth=label_smoothing != 0.0, softcap=softcap
        )
        loss, lse, residual_sq, _, correct, valid = finalize(
            partials, z, feature_sq, target, logits.shape[1], class_weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
    return loss, lse, residual_sq, feature_sq, correct, valid


def linear_cross_entropy(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,) int64
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, ...]:
    """The fields of BatchStatistics of ``features @ weight.T + bias``, which is never stored, then 1 - p_y."""
    features, weight, target = rows(features), rows(weight), target.contiguous()
    bias = None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.contiguous()
    with torch.cuda.device_of(features):
        z, feature_sq = target_logit(
            target, len(weight), features=features, weight=weight, bias=bias, plus=float(bias is not None)
        )
        partials, _ = statistics(
            features, weight, bias, target, class_weight=class_weight, smooth=label_smoothing != 0.0, softcap=softcap
        )
        loss, lse, residual_sq, others, correct, valid = finalize(
            partials, z, feature_sq, target, len(weight), class_weight=class_weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
    return loss, lse, residual_sq, feature_sq, correct, valid, others


def linear_cross_entropy_statistics(*arguments: Any) -> Statistics:
    """The fields of BatchStatistics; arguments as for :func:`linear_cross_entropy`."""
    return linear_cross_entropy(*arguments)[:6]


def linear_cross_entropy_backward(
    scale: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, others: Tensor,
    class_weight: Tensor | None, **options: Any,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the rows given; see :func:`.linear_cross_entropy.backward`."""
    with torch.cuda.device_of(features):
        return head.backward(
            scale, rows(features), rows(weight), None if bias is None else bias.contiguous(), target, lse, others,
            None if class_weight is None else class_weight.contiguous(), **options,
        )  # fmt: skip


def sketch(
    features: Tensor,  # (n, T, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n, T) int64
    left: Tensor,  # (C, p)
    right: Tensor,  # (d, q), or (d + 1, q) with a bias
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    """(n, p, q) float32 sketches of the sequences' head gradients."""
    n, length, d = features.shape
    h, y = rows(features.reshape(n * length, d)), target.reshape(n * length).contiguous()
    with torch.cuda.device_of(features):
        projected, valid = projected_residuals(
            h, rows(weight), None if bias is None else bias.contiguous(), y, left,
            None if class_weight is None else class_weight.contiguous(), ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip
    h = torch.where(valid[:, None], h, 0.0)
    mapped = h.float() @ right[:d].float()
    if bias is not None:
        mapped = mapped + right[d].float()
    return torch.bmm(projected.view(n, length, -1).transpose(1, 2), mapped.view(n, length, -1))


def residual(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    lse: Tensor,  # (n,)
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> Tensor:
    """(n, C) float32 gradient of each row's loss with respect to its logits."""
    with torch.cuda.device_of(logits):
        return residual_kernels.residual(
            rows(logits), target.contiguous(), lse.contiguous(),
            class_weight=None if class_weight is None else class_weight.contiguous(), ignore_index=ignore_index,
            label_smoothing=label_smoothing, softcap=softcap,
        )  # fmt: skip


def gradient_gram(residual: Tensor, features: Tensor, bias: bool) -> Tensor:
    """(n, n) float32 inner products of the per-sample gradients."""
    with torch.cuda.device_of(residual):
        return gram(rows(residual), rows(features), bias=bias)
