"""Backward of the head and its loss where rows leave tiles of classes out: residuals of the others, gathered by tile.

What is left out, and why it goes by single rows, is in selbp/ops/_skipped_tiles.py: the forward's shares say it before
any logits are formed. Each tile of classes has a list of the rows that form it, as a mixture of experts has of its
tokens. Two of the three products run over these lists; a row is contiguous, so that gathering it costs no bandwidth.

    R[rows of the tile, tile] = s dl/dz     as in linear_cross_entropy.py; the rest of a chunk is 0
    dW[tile] = R[rows, tile]^T H[rows] + left out      dH += R W[chunk], by the BLAS; before it what is left out

With m_it the mean of the scaled residuals that row i leaves out over tile t, and 0 for those it forms, what is left out
is (m^T H)_t for every class of t, and m (sums of W over the tiles): two products of k tiles d in float32.

Tile picture: one program per part of a tile and block of its list, first of residuals, then of the weight's gradient.

                  TILE classes                          d
    list of the  [ R ][ R ]  (ROWS, COLUMNS)   TILE    [ dW ][ dW ]   each walks the list of its tile
    tile's rows  [ R ][ R ]                    classes [ dW ][ dW ]   in order: no atomics

dH keeps all its flops: its rows differ in which classes they form, and adding each tile's share to them would move
8 f k d bytes a tile. With f the part of (row, tile) pairs that is formed: flops (4 f + 2) k C d; bytes (2 f + 2) k C
item for R, zeroed first. How long a list is, the host never knows: programs past its end do nothing.

Tiles of 128 rows, for which all three products could run over tiles alone, leave too little out. With SmolLM2-135M on
English prose f is 0.42, 0.15 and 0.05 at skip_mass 0.02, 0.1 and 0.3; as a part of tiles of 128 rows, sorted by their
targets, the pairs make up 0.997, 0.86 and 0.52, or by the best choice for 128 rows 0.89, 0.65 and 0.36. A rule that a
program decides by itself, a part skip_mass / tiles of 1 - p_y for each tile, would form 0.99 of them at 0.1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .linear_cross_entropy import CHUNK_BYTES, add_product, residual_tile, row_terms
from .matmul_tile import capped_logits, dot_precision, pointed_product

TILE = 256  # classes of a tile, of selbp/ops/_skipped_tiles.py


@triton.jit(do_not_specialize=["k", "n_columns", "first_class"])
def gathered_residual_kernel(
    features,
    weight,
    bias,
    target,
    lse,
    p_rest,
    scale,
    mass,
    rest,
    lists,
    counts,
    out,
    k,
    n_columns,
    first_class,
    d,
    stride_h,
    stride_w,
    stride_out,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``residual_chunk_kernel`` for the rows that ``lists`` names for each tile; other entries of out stay.

    out is as wide as whole tiles, and what it holds past the last class means nothing: a mask of columns, of which the
    compiler knows no multiple, would make it move one entry at a time.
    """
    parts: tl.constexpr = TILE // COLUMNS
    n_blocks = tl.cdiv(k, ROWS)
    block = (tl.program_id(0) // parts) % n_blocks
    part = tl.program_id(0) // parts // n_blocks * parts + tl.program_id(0) % parts
    tile = part * COLUMNS // TILE
    place = block * ROWS + tl.arange(0, ROWS)
    count = tl.load(counts + tile)
    if block * ROWS < count:
        inside = place < count
        rows = tl.load(lists + tl.cast(tile, tl.int64) * (k + 1) + place, mask=inside, other=0)
        columns = part * COLUMNS + tl.arange(0, COLUMNS)
        within = columns < n_columns
        depth = tl.arange(0, DEPTH)
        left = features + (rows.to(tl.int64) * stride_h)[:, None] + depth[None, :]
        right = weight + (tl.where(within, columns, 0).to(tl.int64) * stride_w)[None, :] + depth[:, None]
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        z = pointed_product(left, right, z, d, DEPTH, EVEN_DEPTH, PRECISION)
        z, g = capped_logits(z, bias, columns, n_columns, softcap, False, HAS_BIAS, SOFTCAP)
        r = residual_tile(
            z, g, z, columns + first_class, rows, inside, target, lse, p_rest, scale, mass, rest, 0.0,
            SOFTCAP, False, False,
        )  # fmt: skip
        place_out = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(place_out, r.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["k", "n_columns"])
def gathered_weight_kernel(
    residuals,
    features,
    lists,
    counts,
    left_out,
    out,
    k,
    n_columns,
    d,
    stride_r,
    stride_h,
    stride_out,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[c] = sum of R[i, c] H[i] over the rows that the tile of class c lists, in order, plus left_out[tile]."""
    n_widths = tl.cdiv(d, WIDTH)
    part = tl.program_id(0) // n_widths
    tile = part * CLASSES // TILE
    columns = part * CLASSES + tl.arange(0, CLASSES)
    within = columns < n_columns
    across = (tl.program_id(0) % n_widths) * WIDTH + tl.arange(0, WIDTH)
    named = lists + tl.cast(tile, tl.int64) * (k + 1)
    count = tl.load(counts + tile)
    total = tl.zeros((CLASSES, WIDTH), tl.float32)
    for at in range(0, count, DEPTH):
        place = at + tl.arange(0, DEPTH)
        inside = place < count
        rows = tl.load(named + place, mask=inside, other=0).to(tl.int64)
        r = tl.load(residuals + rows[:, None] * stride_r + columns[None, :], mask=inside[:, None], other=0.0)
        h = features + rows[:, None] * stride_h + across[None, :]
        h = tl.load(h, mask=inside[:, None] & (across < d)[None, :], other=0.0)
        total = tl.dot(r.T, h, total, input_precision=PRECISION)
    total += tl.load(left_out + tl.cast(tile, tl.int64) * d + across, mask=across < d, other=0.0)[None, :]
    place = out + columns.to(tl.int64)[:, None] * stride_out + across[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=within[:, None] & (across < d)[None, :])


class Formed(NamedTuple):
    """Which rows form a tile, and what the others leave out."""

    lists: torch.Tensor  # (tiles, k + 1) int32: the rows in order, then anything
    counts: torch.Tensor  # (tiles,) int32
    mean: torch.Tensor  # (k, tiles) float32, of the scaled residuals of a tile that is left out, else 0


def formed(left_out: torch.Tensor, scale: torch.Tensor, mass: torch.Tensor, n_classes: int) -> Formed:
    """Lists of the rows that have a gradient and do not leave a tile out: one that is not finite forms every tile."""
    k, tiles = left_out.shape
    live = scale != 0
    out = (left_out >= 0) & (scale.isfinite() & live)[:, None]
    listed = (live[:, None] & ~out).t()
    place = listed.cumsum(1, dtype=torch.int32)
    rows = torch.arange(k, dtype=torch.int32, device=scale.device).expand(tiles, k)
    lists = torch.empty(tiles, k + 1, dtype=torch.int32, device=scale.device)
    lists.scatter_(1, torch.where(listed, place - 1, k).long(), rows)
    sizes = torch.full_like(left_out[0], TILE)
    sizes[-1:] -= tiles * TILE - n_classes
    mean = torch.where(out, left_out * (scale * mass)[:, None] / sizes, 0.0)
    return Formed(lists, place[:, -1].contiguous(), mean)


def backward(
    scale: torch.Tensor,  # (k,) float32 incoming gradients; 0 where the row has none
    features: torch.Tensor,  # (k, d), finite where scale is not 0 and 0 elsewhere
    weight: torch.Tensor,  # (C, d)
    bias: torch.Tensor | None,  # (C,)
    target: torch.Tensor,  # (k,) int64
    lse: torch.Tensor,  # (k,)
    p_rest: torch.Tensor,  # (k,) 1 - p_y
    class_weight: torch.Tensor | None,  # (C,)
    left_out: torch.Tensor,  # (k, tiles) float32 probability of each tile that the row leaves out, negative elsewhere
    *,
    softcap: float = 0.0,
    need_features: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    tile: configs.Tile | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What :func:`.linear_cross_entropy.backward` returns, without label smoothing; ``chunk`` is a multiple of TILE."""
    (k, d), n_classes, item = features.shape, len(weight), features.element_size()
    if k == 0:
        d_features = features.new_zeros(0, d, dtype=torch.float32) if need_features else None
        d_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        return d_features, torch.zeros_like(weight) if need_weight else None, d_bias
    rows = row_terms(scale, target, lse, p_rest, class_weight, 0.0, n_classes)
    lists, counts, mean = formed(left_out, rows[3], rows[4], n_classes)
    tile = (tile or configs.tile("chunk", features.device, features.dtype)).with_pointers()
    chunk = min(chunk or max(TILE, CHUNK_BYTES // (k * item) // TILE * TILE), left_out.shape[1] * TILE)
    buffer = torch.empty(k, chunk, dtype=features.dtype, device=features.device)
    d_features = mean @ _tile_sums(weight) if need_features else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = torch.empty_like(bias) if need_bias and bias is not None else None
    of_classes = mean.t() @ features.float() if need_weight else None
    blocks, shape = triton.cdiv(k, tile.rows), {"DEPTH": tile.depth, "TILE": TILE}
    width = tile.columns // 2 if softcap else tile.columns  # a cap's slope takes as many registers as the logits
    options = {"PRECISION": dot_precision(features.dtype), "num_warps": tile.warps, "num_stages": tile.stages}
    for first in range(0, n_classes, chunk):
        part = slice(first, min(first + chunk, n_classes))
        tiles = slice(first // TILE, -(-part.stop // TILE))
        columns, w, r = part.stop - first, weight[part], buffer.zero_()[:, : part.stop - first]
        gathered_residual_kernel[((tiles.stop - tiles.start) * blocks * (TILE // width),)](
            features,
            w,
            None if bias is None else bias[part],
            *rows,
            lists[tiles],
            counts[tiles],
            buffer,
            k,
            columns,
            first,
            d,
            features.stride(0),
            w.stride(0),
            buffer.stride(0),
            softcap or 1.0,
            ROWS=tile.rows,
            COLUMNS=width,
            EVEN_DEPTH=d % tile.depth == 0,
            HAS_BIAS=bias is not None,
            SOFTCAP=bool(softcap),
            enable_fp_fusion=True,
            **shape,
            **options,
        )
        if d_bias is not None:
            common = mean[:, tiles].sum(0).repeat_interleave(TILE)[:columns]
            d_bias[part] = r.sum(0, dtype=torch.float32) + common
        if d_weight is not None:
            gathered_weight_kernel[(triton.cdiv(columns, tile.columns) * triton.cdiv(d, tile.rows),)](
                buffer,
                features,
                lists[tiles],
                counts[tiles],
                of_classes[tiles],
                d_weight[part],
                k,
                columns,
                d,
                buffer.stride(0),
                features.stride(0),
                d_weight.stride(0),
                CLASSES=tile.columns,
                WIDTH=tile.rows,
                enable_fp_fusion=True,
                **shape,
                **options,
            )
        if d_features is not None:
            add_product(d_features, r, w)
    return d_features, d_weight, d_bias


def _tile_sums(weight: torch.Tensor) -> torch.Tensor:
    """(tiles, d) float32 sums of the rows of each tile."""
    whole = len(weight) // TILE * TILE
    sums = weight[:whole].unflatten(0, (-1, TILE)).sum(1, dtype=torch.float32)
    return sums if whole == len(weight) else torch.cat([sums, weight[whole:].sum(0, True, dtype=torch.float32)])
