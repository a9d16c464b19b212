"""The cross-entropy: its statistics, its residual, and the sketch of a sequence's gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.types import BatchStatistics, widest


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(logits / softcap)``; the identity where the cap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def soft_target(
    target: Tensor, n_classes: int, class_weight: Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """(n, C) soft target t. ``target`` must lie in [0, C)."""
    w = torch.ones(n_classes, dtype=dtype, device=target.device) if class_weight is None else class_weight.to(dtype)
    onehot = torch.zeros(len(target), n_classes, dtype=dtype, device=target.device).scatter_(1, target[:, None], 1.0)
    return (1.0 - label_smoothing) * onehot * w + label_smoothing / n_classes * w


def label_mass(
    target: Tensor, class_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(n,) what the labels (n,) or (n, T) of each sample count in torch's mean, and (n,) bool whether it has any.

    A label counts its class weight, 1 where there are none, and 0 where it is ignored.
    """
    present = target != ignore_index
    if class_weight is None:
        mass = present.to(dtype)
    else:
        mass = torch.where(present, class_weight.to(dtype)[target.clamp(0, len(class_weight) - 1)], 0.0)
    return (mass, present) if target.dim() == 1 else (mass.sum(1), present.any(1))


def scale_of(mass: Tensor, valid: Tensor) -> Tensor:
    """() s with (1/n) sum s l_i = torch's mean over valid samples; 0 where there is none."""
    wide = widest(mass.device)
    total = torch.where(valid, mass, 0.0).sum(dtype=wide)
    return torch.where(total > 0, len(mass) / total, 0.0)


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None = None,  # (n, d)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    bias: bool = True,
) -> BatchStatistics:
    """Per-sample loss, gradient norms and correctness of ``n`` rows of logits.

    The target's logit is held apart and only the other classes are accumulated, so that neither the loss nor the
    norm cancels for confident rows: with p_rest = 1 - p_y, both ``-log p_y = log1p(e^(m - z_y) s)`` and
    ``||r||^2 = p_rest^2 + sum_{c != y} p_c^2`` keep their relative accuracy down to p_rest = 1e-300.
    """
    n, n_classes = logits.shape
    present = (target != ignore_index) & (target >= 0) & (target < n_classes)
    y = torch.where(present, target, 0)[:, None]
    z = soft_cap(logits, softcap)
    z_y = z.gather(1, y)[:, 0]
    z_rest = z.scatter(1, y, -torch.inf)
    lse = torch.logsumexp(z, 1)
    loss_y = torch.nn.functional.softplus(torch.logsumexp(z_rest, 1) - z_y, threshold=40.0)  # lse - z_y
    t = soft_target(y[:, 0], n_classes, class_weight, label_smoothing, z.dtype)
    t_y = t.gather(1, y)[:, 0]
    spread = torch.where(t == 0, 0.0, t * (lse[:, None] - z)).scatter(1, y, 0.0).sum(1)  # 0 * inf is 0 here
    loss = torch.where(
        lse == torch.inf, torch.nan, t_y * loss_y + spread
    )  # a logit of +inf leaves no loss, as in torch

    r = residual(
        logits,
        target,
        lse,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    residual_sq = r.square().sum(1)
    loss = torch.where(target == ignore_index, 0.0, torch.where(present, loss, torch.nan))
    residual_sq = torch.where(torch.isfinite(loss), residual_sq, torch.nan)
    if features is None:
        feature_sq = torch.ones_like(loss)
    else:
        feature_sq = features.square().sum(1) + float(bias)
    valid = present & torch.isfinite(torch.stack([loss, lse, residual_sq, feature_sq])).all(0)
    correct = valid & (z_y >= z_rest.amax(1))
    return BatchStatistics(loss, lse, residual_sq, feature_sq, correct, valid)


def linear_cross_entropy_statistics(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> BatchStatistics:
    """:func:`cross_entropy_statistics` of ``features @ weight.T + bias``."""
    logits = torch.nn.functional.linear(features, weight, bias)
    return cross_entropy_statistics(
        logits,
        target,
        features,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        bias=bias is not None,
    )


def residual(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,)
    lse: Tensor,  # (n,) of the soft-capped logits
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """(n, C) gradient of each row's loss with respect to its logits (before the cap); 0 where the row is not valid.

    The target's entry is ``T p_y - t_y = (T - t_y) - T sum_{c != y} p_c``: ``p_y - 1`` would cancel.
    """
    n, n_classes = logits.shape
    present = (target != ignore_index) & (target >= 0) & (target < n_classes)
    y = torch.where(present, target, 0)[:, None]
    z = soft_cap(logits, softcap)
    probs = torch.exp(z - lse[:, None])
    t = soft_target(y[:, 0], n_classes, class_weight, label_smoothing, z.dtype)
    total = t.sum(1, keepdim=True)
    p_rest = probs.scatter(1, y, 0.0).sum(1, keepdim=True)
    rest = t.scatter(1, y, 0.0).sum(1, keepdim=True)
    r = (total * probs - t).scatter(1, y, rest - total * p_rest)
    if softcap:
        r = r * (1.0 - (z / softcap).square())
    finite = torch.isfinite(lse) & torch.isfinite(torch.where(t == 0, 0.0, z)).all(1)  # the loss is finite
    return torch.where((present & finite)[:, None], r, 0.0)


def sketch(
    features: Tensor,  # (n, T, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n, T)
    left: Tensor,  # (C, p)
    right: Tensor,  # (d, q), (d + 1, q) with a bias
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """(n, p, q) sketch ``sum_t (left^T r_t) (right^T [h_t, 1])^T`` of each sequence's head gradient."""
    n, length, d = features.shape
    h, y = features.reshape(n * length, d), target.reshape(n * length)
    logits = torch.nn.functional.linear(h, weight, bias)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "softcap": softcap}
    stats = cross_entropy_statistics(logits, y, h, class_weight=class_weight, **options)
    r = residual(logits, y, stats.lse, class_weight=class_weight, **options)
    if bias is not None:
        h = torch.cat([h, h.new_ones(len(h), 1)], 1)
    h = torch.where(stats.valid[:, None], h, 0.0)
    return torch.einsum(
        "ntp,ntq->npq", (r @ left).view(n, length, left.shape[1]), (h @ right).view(n, length, right.shape[1])
    )
