"""The CUDA side of ``linear_cross_entropy``: the Triton kernels, or the specification where they cannot run."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype
from selbp.ops import _backends, _skipped_tiles
from selbp.ops._loss_options import LossOptions

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


class Head(NamedTuple):
    """A head and its input."""

    features: Tensor  # (n, d)
    weight: Tensor  # (C, d)
    bias: Tensor | None  # (C,)


class Scored(NamedTuple):
    """What the forward keeps of each row for the backward."""

    target: Tensor  # (n,) int64
    lse: Tensor  # (n,)
    p_rest: Tensor  # (n,) 1 - p_y, the schema's ``others``
    valid: Tensor  # (n,) bool
    logits: Tensor  # (n, C) as the head gave them, or of no elements: they are then formed again
    left_out: Tensor  # (n, tiles), see _skipped_tiles.py, or of no elements


class Needs(NamedTuple):
    """Which gradients are wanted."""

    features: bool
    weight: bool
    bias: bool


def forward(
    head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool, skip_mass: float
) -> Forward:
    """The fields of BatchStatistics, (n,) 1 - p_y, no logits, and what is left out: nothing where Triton is missing."""
    features, weight, bias = head
    dtype, skips = accumulate_dtype(features.dtype), _skipped_tiles.leaves_out(skip_mass, options)
    no_logits, formed = features.new_empty(0, 0), features.new_empty(0, 0, dtype=dtype)
    fused = _backends.kernels(features)
    if fused is not None:
        share_of = _skipped_tiles.COLUMNS if skips else 0
        found, shares = fused.linear_cross_entropy(features, weight, bias, target, options, share_of)
        if skips:
            formed = _skipped_tiles.left_out_of(shares, target, found[-1], skip_mass)
        return *found, no_logits, formed
    if skips:
        shape = _skipped_tiles.table_shape(len(target), len(weight))
        formed = features.new_full(shape, _skipped_tiles.FORMED, dtype=dtype)
    logits = torch.nn.functional.linear(features, weight, bias).to(dtype)
    stats = reference.cross_entropy_statistics(
        logits, target, features.to(dtype), bias=bias is not None, **options._asdict()
    )
    y = torch.where((target >= 0) & (target < weight.shape[0]), target, 0)[:, None]
    capped = reference.soft_cap(logits, options.softcap).scatter(1, y, -torch.inf)
    return *stats, torch.exp(torch.logsumexp(capped, 1) - stats.lse), no_logits, formed


def empty_gradients(head: Head, needs: Needs) -> Gradients:
    """One tensor per input, of no elements where its gradient is not needed."""
    features, weight, bias = head
    d_features = features.new_empty(features.shape if needs.features else (0,))
    d_weight = weight.new_empty(weight.shape if needs.weight else (0,))
    return d_features, d_weight, weight.new_empty(weight.shape[0] if needs.bias and bias is not None else 0)


def backward(
    grad: Tensor, head: Head, scored: Scored, rows: Tensor | None, options: LossOptions, needs: Needs
) -> Gradients:
    """The gradients of features, weight and bias, of no elements where they are not needed."""
    features, weight, bias = head
    fused = _backends.kernels(features)
    if fused is not None:
        return _backward_fused(fused, grad, head, scored, rows, options, needs)
    dtype, chosen = accumulate_dtype(features.dtype), rows
    scale = torch.where(scored.valid, grad.to(dtype), 0.0)
    if chosen is None:
        chosen = torch.arange(len(features), device=features.device)
    else:  # a row named twice shares its gradient between its places
        places = torch.zeros_like(scale).index_add_(0, chosen, torch.ones_like(chosen, dtype=dtype))
        scale = scale / places.clamp(min=1)
    live = scored.valid[chosen][:, None]
    h = torch.where(live, features[chosen], 0.0)
    logits = torch.nn.functional.linear(features[chosen], weight, bias).to(dtype)
    r = reference.residual(logits, scored.target[chosen], scored.lse[chosen], **options._asdict())
    r = r * scale[chosen, None]
    d_features, d_weight, d_bias = empty_gradients(head, needs)
    if needs.features:
        d_features = d_features.zero_().index_add_(0, chosen, (r.to(weight.dtype) @ weight))
    if needs.weight:
        d_weight = r.to(weight.dtype).t() @ h
    if needs.bias:
        d_bias = r.sum(0).to(weight.dtype)
    return d_features, d_weight, d_bias


def _backward_fused(
    fused: ModuleType,
    grad: Tensor,
    head: Head,
    scored: Scored,
    rows: Tensor | None,
    options: LossOptions,
    needs: Needs,
) -> Gradients:
    features, weight, bias = head
    target, lse, p_rest, valid, _, left_out = scored
    scale, h = torch.where(valid, grad.float(), 0.0), torch.where(valid[:, None], features, 0.0)
    if rows is not None:
        # A row named twice counts at its last place, and the others add 0: the same bits in any order.
        place = torch.arange(len(rows), device=rows.device)
        last = torch.full_like(target, -1).scatter_reduce(0, rows, place, "amax")
        scale, h = torch.where(last[rows] == place, scale[rows], 0.0), h[rows]
        target, lse, p_rest = target[rows], lse[rows], p_rest[rows]
    table = None
    if left_out.shape[1]:
        table = left_out if rows is None else left_out[rows]
    dh, dw, db = fused.linear_cross_entropy_backward(
        scale, (h, weight, bias), (target, lse, p_rest), options, needs, table
    )
    if dh is not None and rows is not None:
        dh = torch.zeros_like(features, dtype=dh.dtype).index_add_(0, rows, dh)
    nothing = features.new_empty(0)
    return (
        nothing if dh is None else dh.to(features.dtype),
        nothing.clone() if dw is None else dw,
        nothing.clone() if db is None else db,
    )
