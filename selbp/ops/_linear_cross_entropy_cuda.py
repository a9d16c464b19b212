"""The CUDA side of ``linear_cross_entropy``: the Triton kernels, or the specification where they cannot run."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype
from selbp.ops import _triton

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def forward(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    rows: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> Forward:  # fmt: skip
    """The fields of BatchStatistics, then (n,) 1 - p_y."""
    fused = _triton.kernels("cross_entropy", features)
    if fused is not None:
        return fused.linear_cross_entropy(
            features, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap
        )
    dtype = accumulate_dtype(features.dtype)
    logits = torch.nn.functional.linear(features, weight, bias).to(dtype)
    stats = reference.cross_entropy_statistics(
        logits, target, features.to(dtype), class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, bias=bias is not None,
    )  # fmt: skip
    y = torch.where((target >= 0) & (target < weight.shape[0]), target, 0)[:, None]
    capped = reference.soft_cap(logits, softcap).scatter(1, y, -torch.inf)
    return *stats, torch.exp(torch.logsumexp(capped, 1) - stats.lse)


def empty_gradients(
    features: Tensor, weight: Tensor, bias: Tensor | None, need_features: bool, need_weight: bool, need_bias: bool
) -> Gradients:
    """One tensor per input, of no elements where its gradient is not needed."""
    d_features = features.new_empty(features.shape if need_features else (0,))
    d_weight = weight.new_empty(weight.shape if need_weight else (0,))
    return d_features, d_weight, weight.new_empty(weight.shape[0] if need_bias and bias is not None else 0)


def backward(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, others: Tensor,
    valid: Tensor, class_weight: Tensor | None, rows: Tensor | None, ignore_index: int, label_smoothing: float,
    softcap: float, need_features: bool, need_weight: bool, need_bias: bool,
) -> Gradients:  # fmt: skip
    """The gradients of features, weight and bias, of no elements where they are not needed."""
    fused = _triton.kernels("cross_entropy", features)
    if fused is not None:
        options = {
            "label_smoothing": label_smoothing, "softcap": softcap, "need_features": need_features,
            "need_weight": need_weight, "need_bias": need_bias,
        }  # fmt: skip
        return _backward_fused(
            fused, grad, features, weight, bias, target, lse, others, valid, class_weight, rows, options
        )
    dtype, chosen = accumulate_dtype(features.dtype), rows
    scale = torch.where(valid, grad.to(dtype), 0.0)
    if chosen is None:
        chosen = torch.arange(len(features), device=features.device)
    else:  # a row named twice shares its gradient between its places
        places = torch.zeros_like(scale).index_add_(0, chosen, torch.ones_like(chosen, dtype=dtype))
        scale = scale / places.clamp(min=1)
    live = valid[chosen][:, None]
    h = torch.where(live, features[chosen], 0.0)
    logits = torch.nn.functional.linear(features[chosen], weight, bias).to(dtype)
    r = reference.residual(
        logits, target[chosen], lse[chosen], class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
    ) * scale[chosen, None]  # fmt: skip
    d_features, d_weight, d_bias = empty_gradients(features, weight, bias, need_features, need_weight, need_bias)
    if need_features:
        d_features = d_features.zero_().index_add_(0, chosen, (r.to(weight.dtype) @ weight))
    if need_weight:
        d_weight = r.to(weight.dtype).t() @ h
    if need_bias:
        d_bias = r.sum(0).to(weight.dtype)
    return d_features, d_weight, d_bias


def _backward_fused(
    fused: ModuleType, grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor,
    others: Tensor, valid: Tensor, class_weight: Tensor | None, rows: Tensor | None, options: dict[str, Any],
) -> Gradients:  # fmt: skip
    scale, h = torch.where(valid, grad.float(), 0.0), torch.where(valid[:, None], features, 0.0)
    if rows is not None:
        # A row named twice counts at its last place, and the others add 0: the same bits in any order.
        place = torch.arange(len(rows), device=rows.device)
        last = torch.full_like(target, -1).scatter_reduce(0, rows, place, "amax")
        scale, h = torch.where(last[rows] == place, scale[rows], 0.0), h[rows]
        target, lse, others = target[rows], lse[rows], others[rows]
    dh, dw, db = fused.linear_cross_entropy_backward(
        scale, h, weight, bias, target, lse, others, class_weight, **options
    )
    if dh is not None and rows is not None:
        dh = torch.zeros_like(features, dtype=dh.dtype).index_add_(0, rows, dh)
    nothing = features.new_empty(0)
    return (
        nothing if dh is None else dh.to(features.dtype),
        nothing.clone() if dw is None else dw,
        nothing.clone() if db is None else db,
    )
