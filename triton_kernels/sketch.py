"""Projected residuals P^T r_t of every token, the factor of a sequence's gradient sketch that needs the classes.

    S_i = sum_t (P^T r_t) (Q^T [h_t, 1])^T,        P (C, p), Q (d or d + 1, q)

P^T r_t = sum_c r_tc P_c has the shape of attention with keys W and values P: a tile of H W^T becomes residuals in
registers (the forward pass has left lse and 1 - p_y) and is multiplied by the tile of P at once, so that neither
logits nor residuals are stored. Q^T h and the outer products over t are small products for the BLAS. With the pass of
``statistics`` before it a sketch costs 2 n C (2 d + p) flops; running sums of e P_c beside those of statistics would do
with 2 n C (d + p), which the CPU implementation does and this one does not.

Tile picture: program (row tile, split) walks its class tiles and keeps ROWS x p sums in registers.

            [ W0 ] [ W1 ] [ W2 ]        (COLUMNS, d)
    [ H ]   |  r  |  r   |  r   |       each r (ROWS, COLUMNS) in registers only
               x     x      x
            [ P0 ] [ P1 ] [ P2 ]        (COLUMNS, p)   -> sums (ROWS, p), added over the splits in order

Flops 2 n C (d + p): the projection is p / d of extra work (1.6 % at d = 4096, p = 64) beside a second H W^T; bytes at
least (n + C) d item + C p 4 + splits n p 4. The residual is rounded to the inputs' dtype before its product with P.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import grouped_tile
from .linear_cross_entropy import residual_tile, row_terms
from .product import dot_precision, logits_tile, operands
from .statistics import class_splits

WIDTH = 64  # columns of P that one launch projects onto


@triton.jit
def sketch_kernel(
    features, weight, bias, class_weight, target, lse, others, scale, mass, rest, projection, out,
    n, n_classes, d, p, stride_h, stride_w, stride_p, tiles_per_split, share, softcap,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EVEN_DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr, HAS_WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, row, :p] = the sum of scale r_c P_c over the split's classes."""
    n_row_tiles = tl.cdiv(n, ROWS)
    n_splits = tl.num_programs(0) // n_row_tiles
    row_tile, split = grouped_tile(tl.program_id(0), n_row_tiles, n_splits, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    width = tl.arange(0, WIDTH)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n_classes, COLUMNS))
    for tile in range(first, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        within = columns < n_classes
        z, g = logits_tile(
            features, weight, bias, row_tile, tile, n, n_classes, d, stride_h, stride_w, softcap,
            ROWS, COLUMNS, DEPTH, DESCRIPTOR, False, EVEN_DEPTH, HAS_BIAS, SOFTCAP, PRECISION,
        )  # fmt: skip
        w = z
        if SMOOTH and HAS_WEIGHT:
            w = tl.load(class_weight + columns, mask=within, other=0.0).to(tl.float32)[None, :]
        r = residual_tile(
            z, g, w, columns, rows, inside, target, lse, others, scale, mass, rest, share, SOFTCAP, SMOOTH, HAS_WEIGHT
        )
        # Classes past the end carry what a clamped or zero row of W gives; their rows of P are 0, and they are finite.
        r = tl.where(within[None, :], r, 0.0)
        values = projection + columns.to(tl.int64)[:, None] * stride_p + width[None, :]
        values = tl.load(values, mask=within[:, None] & (width < p)[None, :], other=0.0)
        sums = tl.dot(r.to(values.dtype), values, sums, input_precision=PRECISION)
    place = out + (split.to(tl.int64) * n + rows)[:, None] * p + width[None, :]
    tl.store(place, sums, mask=inside[:, None] & (width < p)[None, :])


def projected_residuals(
    scale: torch.Tensor,  # (n,) float32; 0 where a row does not count
    features: torch.Tensor,  # (n, d), last dimension contiguous
    weight: torch.Tensor,  # (C, d), last dimension contiguous
    bias: torch.Tensor | None,  # (C,)
    target: torch.Tensor,  # (n,) int64
    lse: torch.Tensor,  # (n,)
    others: torch.Tensor,  # (n,) 1 - p_y
    projection: torch.Tensor,  # (C, p)
    class_weight: torch.Tensor | None = None,  # (C,)
    *,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """(n, p) float32, ``scale_i sum_c r_ic P_c``."""
    (n, d), n_classes = features.shape, len(weight)
    tile = tile or configs.tile("sketch", features.device, features.dtype)
    if n == 0:
        return features.new_empty((0, projection.shape[1]), dtype=torch.float32)
    descriptor, pair = operands(tile.descriptor, (features, tile.rows, tile.depth), (weight, tile.columns, tile.depth))
    projection = projection.to(features.dtype).contiguous()
    rows = row_terms(scale, target, lse, others, class_weight, label_smoothing, n_classes)
    row_tiles, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.columns)
    count, per_split = class_splits(
        row_tiles, class_tiles, splits * row_tiles if splits else configs.processors(features.device)
    )
    parts = []
    for start in range(0, projection.shape[1], WIDTH):
        values = projection[:, start : start + WIDTH]
        p = values.shape[1]
        out = torch.empty(count, n, p, dtype=torch.float32, device=features.device)
        sketch_kernel[(row_tiles * count,)](
            *pair, bias, class_weight, *rows, values, out, n, n_classes, d, p, features.stride(0),
            weight.stride(0), projection.stride(0), per_split, label_smoothing / n_classes, softcap or 1.0,
            ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth, WIDTH=WIDTH, GROUP=tile.group,
            DESCRIPTOR=descriptor, EVEN_DEPTH=d % tile.depth == 0, HAS_BIAS=bias is not None, SOFTCAP=bool(softcap),
            SMOOTH=label_smoothing != 0.0, HAS_WEIGHT=label_smoothing != 0.0 and class_weight is not None,
            PRECISION=dot_precision(features.dtype), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        parts.append(out.sum(0))
    return torch.cat(parts, 1)
