"""The CPU's side of ``linear_cross_entropy``: a tile of logits at a time, native tiles and BLAS products."""

from __future__ import annotations

import torch
from torch import Tensor

from selbp._checks import accumulate_dtype
from selbp.ops import _gemm
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

# Of residuals: the two products that read them are slower on larger tiles; but of 16-bit inputs each tile's part of the
# features' gradient is widened and added, which costs less often with fewer of them.
_TILE_BYTES = {2: 8 << 20, 4: 2 << 20, 8: 2 << 20}


def forward(head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool) -> Forward:
    features, weight, bias = head
    _check_rows(rows, features.shape[0])
    logit_pass = LogitPass(weight.shape[0], features.dtype, target, features, bias is not None, options)
    p_rest = logit_pass.p_rest = torch.empty(features.shape[0], dtype=accumulate_dtype(features.dtype))
    logits = logit_pass.keep_logits(len(weight)) if keep else features.new_empty(0, 0)
    logit_pass.add_head(features, weight, bias)
    return *logit_pass.outputs, p_rest, logits


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

    def take(tensor: Tensor) -> Tensor:
        return tensor.contiguous() if k == n else tensor.index_select(0, chosen)

    h = features if k == n else take(features)
    tile_rows = ResidualRows(take(scored.target), take(scored.lse), take(scored.p_rest), take(grad.to(accumulate)))
    native, total = native_options(options, accumulate), weight_sum(options, n_classes)
    dh: Tensor | None = None
    columns = min(n_classes, max(64, _TILE_BYTES[features.element_size()] // (4 * k) // 64 * 64))
    room = torch.empty(k * columns, dtype=accumulate) if scored.logits.numel() else None  # kept logits stay as they are
    for c in range(0, n_classes, columns):
        part = weight[c : c + columns]
        if room is not None:
            z = scored.logits[:, c : c + columns]
            z, out = z if k == n else z.index_select(0, chosen), room[: k * len(part)].view(k, len(part))
        else:
            z = contiguous_rows(_gemm.linear(h, part, None if bias is None else bias[c : c + columns]))
            out = in_place(z, accumulate)
        r = residual_tile(out, z, tile_rows, ResidualClasses(c, n_classes, total), native)
        if needs.bias:
            d_bias[c : c + columns] = r.sum(0)
        r = r.to(features.dtype)
        if needs.weight:
            d_weight[c : c + columns] = _gemm.linear(r.t(), h.t())
        if needs.features:
            product = _gemm.linear(r, part.t())
            dh = product.to(accumulate) if dh is None else dh.add_(product)
    if dh is not None:
        if k == n:
            return dh.to(features.dtype), d_weight, d_bias
        d_features.zero_().index_copy_(0, chosen, dh.to(features.dtype))
    return d_features, d_weight, d_bias


def _check_rows(rows: Tensor | None, n: int) -> None:
    """ValueError unless ``rows``, on the CPU, lie in [0, n)."""
    if rows is not None and len(rows):
        least, most = (int(x) for x in rows.aminmax())
        if least < 0 or most >= n:
            raise ValueError(f"rows must lie in [0, {n}), got values from {least} to {most}")
