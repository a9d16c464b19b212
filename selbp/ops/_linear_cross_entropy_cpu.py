"""The CPU's side of ``linear_cross_entropy``: a tile of logits at a time, native tiles and BLAS products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from selbp._checks import accumulate_dtype
from selbp.ops import _gemm, _skipped_tiles
from selbp.ops._linear_cross_entropy_cuda import Forward, Gradients, Head, Needs, Scored, empty_gradients
from selbp.ops._logit_pass import (
    LogitPass,
    ResidualClasses,
    ResidualRows,
    contiguous_rows,
    in_place,
    native_options,
    residual_tile,
    weight_sum,
)
from selbp.ops._loss_options import LossOptions

# Bytes of a tile of residuals, by the inputs' bytes an entry. The two products that read a tile are faster on small
# tiles. With 16-bit inputs each tile also widens and adds its part of the features' gradient, so there fewer tiles win.
_TILE_BYTES = {2: 8 << 20, 4: 2 << 20, 8: 2 << 20}


def forward(
    head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool, skip_mass: float
) -> Forward:
    features, weight, bias = head
    _check_rows(rows, features.shape[0])
    logit_pass = LogitPass(weight.shape[0], features.dtype, target, features, bias is not None, options)
    p_rest = logit_pass.p_rest = torch.empty(features.shape[0], dtype=accumulate_dtype(features.dtype), device="cpu")
    logits = logit_pass.keep_logits(len(weight)) if keep else features.new_empty(0, 0)
    left_out = p_rest.new_empty(0, 0)
    if _skipped_tiles.leaves_out(skip_mass, options):
        sums = logit_pass.keep_sums(_skipped_tiles.table_shape(len(target), len(weight))[1])
        logit_pass.add_head(features, weight, bias)
        left_out = _skipped_tiles.left_out(sums, logit_pass.target, p_rest, skip_mass)
    else:
        logit_pass.add_head(features, weight, bias)
    return *logit_pass.outputs, p_rest, logits, left_out


def backward(
    grad: Tensor, head: Head, scored: Scored, rows: Tensor | None, options: LossOptions, needs: Needs
) -> Gradients:
    features, weight, bias = head
    n, n_classes, accumulate = features.shape[0], weight.shape[0], accumulate_dtype(features.dtype)
    _check_rows(rows, n)
    live = scored.valid & (grad != 0)
    if rows is not None:
        live &= torch.zeros_like(live).index_fill_(0, rows, True)
    chosen = live.nonzero()[:, 0]
    k = len(chosen)
    d_features, d_weight, d_bias = empty_gradients(head, needs)
    if not k:
        return d_features.zero_(), d_weight.zero_(), d_bias.zero_()

    native, total = native_options(options, accumulate), weight_sum(options, n_classes)
    columns = min(n_classes, max(64, _TILE_BYTES[features.element_size()] // (4 * k) // 64 * 64))
    grad = grad.to(accumulate)
    tiles = _skipped_tiles.tiles_of(scored.left_out, n_classes, chosen, grad, scored.target, native.class_weight)
    dh: Tensor | None = None
    if tiles is not None:
        columns = _skipped_tiles.COLUMNS
        if needs.features:
            zeros = features.new_zeros(n, features.shape[1], dtype=accumulate)
            dh = zeros.index_copy_(0, chosen, tiles.of_features(weight))
    # Kept logits stay as they are.
    room = features.new_empty(k * columns, dtype=accumulate) if scored.logits.numel() else None
    for first, some, h, terms, left_out in _pieces(features, scored, grad, chosen, tiles, range(0, n_classes, columns)):
        classes = slice(first, first + columns)
        part = weight[classes]
        if room is not None:
            z = _take(scored.logits[:, classes], some)
            out = room[: z.numel()].view(z.shape)
        else:
            z = contiguous_rows(_gemm.linear(h, part, None if bias is None else bias[classes]))
            out = in_place(z, accumulate)
        r = residual_tile(out, z, terms, ResidualClasses(first, n_classes, total), native)
        if needs.bias:
            d_bias[classes] = r.sum(0) if left_out is None else r.sum(0) + left_out[-1]
        r = r.to(features.dtype)
        if needs.weight:
            d_weight[classes] = _gemm.linear(r.t(), h.t(), None if left_out is None else left_out[:-1])
        if needs.features:
            product = _gemm.linear(r, part.t())
            if dh is None:
                dh = product.to(accumulate)
            else:
                dh = dh.add_(product) if tiles is None else dh.index_add_(0, some, product.to(accumulate))
    if dh is None:
        return d_features, d_weight, d_bias
    if len(dh) == n:
        return dh.to(features.dtype), d_weight, d_bias
    return d_features.zero_().index_copy_(0, chosen, dh.to(features.dtype)), d_weight, d_bias


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """The ``rows`` of a tensor, which ascend; the tensor itself where they are all of them."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, rows)


class _Piece(NamedTuple):
    """Classes from ``first`` on, and the rows whose residuals are formed for them."""

    first: int
    rows: Tensor  # (m,) which of the n
    features: Tensor  # (m, d)
    terms: ResidualRows
    left_out: Tensor | None  # (d + 1,) what the other rows leave out of the gradients of a class's weight and bias


def _pieces(
    features: Tensor, scored: Scored, grad: Tensor, chosen: Tensor, tiles: _skipped_tiles.Tiles | None, starts: range
) -> Iterator[_Piece]:
    """A piece for each of the ``starts``: of the ``chosen`` rows, or of those of ``tiles``."""
    per_row = scored.target, scored.lse, scored.p_rest, grad

    def piece(first: int, rows: Tensor, left_out: Tensor | None) -> _Piece:
        terms = ResidualRows(*(_take(x, rows).contiguous() for x in per_row))
        return _Piece(first, rows, _take(features, rows), terms, left_out)

    if tiles is None:
        every = piece(0, chosen, None)
        yield from (every._replace(first=first) for first in starts)
    else:
        yield from map(piece, starts, tiles.rows, tiles.of_classes(_take(features, chosen)))


def _check_rows(rows: Tensor | None, n: int) -> None:
    """ValueError unless ``rows``, on the CPU, lie in [0, n)."""
    if rows is not None and len(rows):
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= n:
            raise ValueError(f"rows must lie in [0, {n}), got values from {least} to {most}")
