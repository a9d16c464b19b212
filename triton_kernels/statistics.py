"""Online statistics of the classes other than the target, in one pass over the classes; logits are not stored.

online.py says what is kept of each row, and how a tile is added to it.

Tile picture: program (row tile, split) keeps ROWS rows and walks its share of the class tiles.

                 classes of this split ->
            [ W0 ] [ W1 ] [ W2 ]             (COLUMNS, d), streamed through shared memory in steps of DEPTH
    rows    +-----+------+------+
    [ H ]   | acc |  acc |  acc |   -> m, s, s2 in registers -> partials [fields, splits, n]
            +-----+------+------+

GROUP row tiles walk the classes at the same time, so that W is read from DRAM about n / (ROWS * GROUP) times. There
are no atomics: each (split, row) is written by one program, and finalize adds the splits in order.

Flops 2 n C d. Bytes from DRAM at least (n + C) d item; the programs ask the cache for (ROWS + COLUMNS) d item
per row tile and class tile, which the tests count in the interpreter. Epilogue on sm_90: at most 11.5 instructions a
logit (21.5 with smoothing alone, 44.5 with a soft cap alone) against 4096 flops a cycle, so at d >= 4096 the product
dominates. A smaller tile for the options' sake would ask the L2 for more than it gives. So where a whole tile's
epilogue has too few registers beside the products, it takes QUARTERS of their columns one after the other.

``logits_statistics_kernel`` is the same pass where the logits are stored already: it reads each once, n C item bytes.

With a projection P (sketch.py) the same pass sums g e P into ROWS x WIDTH more registers. With PER_TILE it writes what
each tile adds to s, n C / COLUMNS numbers: skipped.py leaves out by them.

Exponentials are not stored for ``residual`` to be made of them. Where the model's forward has written its logits, as in
every training step, statistics and residual each read them, n C 2 item bytes; storing E would add a write. From
features and weight a product must write n C logits that both then read, 3 item; this kernel could write E instead for
residual to read, 2 item. That saves n C item of n C (3 item + 4) bytes with the float32 residuals: 0.17 of 3.8 ms
modelled on an H100 at 8192 x 32000 x 4096 in bfloat16, 3.1 of them the product. E would need each tile's reference
beside it, or a rescaling pass, and a second kernel for residuals in every option: not worth 4 %.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import MINUS_INFINITY, grouped_tile, soft_cap
from .matmul_tile import dot_precision, operands, product, quarters
from .online import FIELDS, absorb, absorb_products, class_weights, empty_state

WIDTH = 64  # columns of P that one launch projects onto


@triton.jit
def store_state(partials, state, rows, inside, split, n, n_splits):
    """Partials [fields, splits, n]: the state without its reference, which follows from m."""
    place = partials + split.to(tl.int64) * n + rows
    tl.store(place, state[0], mask=inside)
    for field in tl.static_range(2, len(state)):
        place += n_splits.to(tl.int64) * n
        tl.store(place, state[field], mask=inside)


@triton.jit(do_not_specialize=["n", "tiles_per_split"])
def statistics_kernel(
    features,
    weight,
    bias,
    class_weight,
    target,
    projection,
    partials,
    sums,
    n,
    n_classes,
    d,
    p,
    stride_h,
    stride_w,
    stride_p,
    tiles_per_split,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    QUARTERS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PER_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials [fields, splits, n] of the logits cap(H W^T + c) over the classes other than each row's target.

    With a WIDTH also sums [1, splits, n, p] of g e P; [2, ...] with smoothing and a cap, the second of g w P.
    PER_TILE, without a WIDTH or smoothing, sums are [class tiles, n]: log2 of the sum of e^z over the tile.
    """
    n_row_tiles = tl.cdiv(n, ROWS)
    n_splits = tl.num_programs(0) // n_row_tiles
    row_tile, split = grouped_tile(tl.program_id(0), n_row_tiles, n_splits, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    y = tl.load(target + rows, mask=inside, other=0)
    y = tl.where((y >= 0) & (y < n_classes), y, 0).to(tl.int32)
    state = empty_state(ROWS, SMOOTH)
    if WIDTH:
        width = tl.arange(0, WIDTH)
        projected = tl.zeros((ROWS, WIDTH), tl.float32)
        if SMOOTH and SOFTCAP:
            weighted = tl.zeros((ROWS, WIDTH), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n_classes, COLUMNS))
    for tile in range(first, last):
        if PER_TILE:
            tile_sum = tl.zeros((ROWS,), tl.float32)
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        z = product(
            features, weight, z, row_tile, tile, n, n_classes, d, stride_h, stride_w,
            ROWS, COLUMNS, DEPTH, DESCRIPTOR, EVEN_COLUMNS, EVEN_DEPTH, PRECISION,
        )  # fmt: skip
        if QUARTERS:
            parts = quarters(z)
            for part in tl.static_range(4):
                at = tile * COLUMNS + part * (COLUMNS // 4)
                # Never false in an exact tile; a branch keeps a slice's work from starting before the last one's ends.
                if at < n_classes:
                    state, _, _, scale, total = absorb_products(
                        parts[part], bias, class_weight, y, at, n_classes, softcap, state,
                        EVEN_COLUMNS, HAS_BIAS, SOFTCAP, SMOOTH, HAS_WEIGHT, QUARTERS,
                    )  # fmt: skip
                    if PER_TILE:
                        tile_sum = tile_sum * scale + total
        else:
            state, e, w, scale, total = absorb_products(
                z, bias, class_weight, y, tile * COLUMNS, n_classes, softcap, state,
                EVEN_COLUMNS, HAS_BIAS, SOFTCAP, SMOOTH, HAS_WEIGHT, QUARTERS,
            )  # fmt: skip
            if PER_TILE:
                tile_sum = total
        if PER_TILE:
            tl.store(sums + tl.cast(tile, tl.int64) * n + rows, state[1] + tl.log2(tile_sum), mask=inside)
        if WIDTH:
            columns = tile * COLUMNS + tl.arange(0, COLUMNS)
            within = (columns < n_classes)[:, None] & (width < p)[None, :]
            values = projection + columns.to(tl.int64)[:, None] * stride_p + width[None, :]
            values = tl.load(values, mask=within, other=0.0)
            projected = projected * scale[:, None]
            projected = tl.dot(e.to(values.dtype), values, projected, input_precision=PRECISION)
            if SMOOTH and SOFTCAP:
                weighted = tl.dot(w.to(values.dtype), values, weighted, input_precision=PRECISION)
    store_state(partials, state, rows, inside, split, n, n_splits)
    if WIDTH:
        place = sums + (split.to(tl.int64) * n + rows)[:, None] * p + width[None, :]
        mask = inside[:, None] & (width < p)[None, :]
        tl.store(place, projected, mask=mask)
        if SMOOTH and SOFTCAP:
            tl.store(place + n_splits.to(tl.int64) * n * p, weighted, mask=mask)


@triton.jit(do_not_specialize=["n", "tiles_per_split"])
def logits_statistics_kernel(
    logits,
    class_weight,
    target,
    partials,
    n,
    n_classes,
    stride_z,
    tiles_per_split,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The same partials from stored logits (n, C)."""
    n_row_tiles = tl.cdiv(n, ROWS)
    n_splits = tl.num_programs(0) // n_row_tiles
    row_tile = tl.program_id(0) % n_row_tiles
    split = tl.program_id(0) // n_row_tiles
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    y = tl.load(target + rows, mask=inside, other=0)
    y = tl.where((y >= 0) & (y < n_classes), y, 0).to(tl.int32)
    state = empty_state(ROWS, SMOOTH)
    z_rows = logits + rows.to(tl.int64)[:, None] * stride_z
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n_classes, COLUMNS))
    for tile in range(first, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < n_classes)[None, :]
        z = tl.load(z_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        g = z
        if SOFTCAP:
            z, g = soft_cap(z, softcap)
        excluded = (columns[None, :] == y[:, None]) | (columns >= n_classes)[None, :]
        z = tl.where(excluded, MINUS_INFINITY, z)
        w = z
        if SMOOTH:
            w = class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT)
        state, _, _, _, _ = absorb(z, g, w, state, SOFTCAP, SMOOTH)
    store_state(partials, state, rows, inside, split, n, n_splits)


def statistics(
    features: torch.Tensor,  # (n, d), last dimension contiguous
    weight: torch.Tensor,  # (C, d), last dimension contiguous
    bias: torch.Tensor | None,  # (C,)
    target: torch.Tensor,  # (n,) int64
    *,
    class_weight: torch.Tensor | None = None,  # (C,), read only with smoothing
    smooth: bool = False,
    softcap: float = 0.0,
    projection: torch.Tensor | None = None,  # (C, p) of the dtype of features, p <= WIDTH; its rows contiguous
    share_of: int = 0,  # classes of a tile whose share is wanted, without a projection or smoothing
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Partials [fields, splits, n] in float32 for :func:`finalize`, and with a projection sums [1 or 2, splits, n, p].

    The sums are of e P over the classes, relative to the reference of their split and row; the second ones, where a
    cap bends the smoothing's share of the target, of the weighted slopes w g P. With ``share_of`` in their place the
    shares (n, tiles) that tiles of so many classes have of the probability of each row's other classes.
    """
    (n, d), (n_classes, p) = features.shape, (len(weight), 0) if projection is None else projection.shape
    pick = partial(
        configs.statistics_tile,
        features.device,
        features.dtype,
        n_classes,
        softcap=bool(softcap),
        smooth=smooth,
        weighted=class_weight is not None,
        projected=projection is not None,
        shares=share_of > 0,
    )
    given, tile = tile, tile or pick(bias=bias is not None)
    descriptor, pair = operands(tile.descriptor, (features, tile.rows, tile.depth), (weight, tile.columns, tile.depth))
    if tile.descriptor and not descriptor:
        tile = (given or pick(bias=True)).with_pointers()  # an exact tile has too many registers for addresses
    row_tiles, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.columns)
    count, per_split = configs.class_splits(row_tiles, class_tiles, configs.processors(features.device), splits)
    partials = torch.empty(FIELDS[smooth], count, n, dtype=torch.float32, device=features.device)
    sums = None if projection is None else partials.new_empty(1 + (smooth and softcap != 0.0), count, n, p)
    if share_of:
        sums = partials.new_empty(class_tiles, n)
    if n == 0:
        return partials, _shares(sums, share_of // tile.columns) if share_of else sums
    statistics_kernel[(row_tiles * count,)](
        *pair,
        bias,
        class_weight,
        target,
        projection,
        partials,
        sums,
        n,
        n_classes,
        d,
        p,
        features.stride(0),
        weight.stride(0),
        0 if projection is None else projection.stride(0),
        per_split,
        softcap or 1.0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        QUARTERS=tile.quarters,
        WIDTH=0 if projection is None else WIDTH,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN_COLUMNS=n_classes % tile.columns == 0,
        EVEN_DEPTH=d % tile.depth == 0,
        HAS_BIAS=bias is not None,
        SOFTCAP=bool(softcap),
        SMOOTH=smooth,
        HAS_WEIGHT=smooth and class_weight is not None,
        PER_TILE=share_of > 0,
        PRECISION=dot_precision(features.dtype),
        num_warps=tile.warps,
        enable_fp_fusion=True,
        num_stages=tile.stages,
    )
    return partials, _shares(sums, share_of // tile.columns) if share_of else sums


def _shares(sums: torch.Tensor, together: int) -> torch.Tensor:
    """(n, tiles) shares of ``together`` tiles each, from log2 of the sums (kernel's tiles, n)."""
    shares = torch.softmax(sums * math.log(2.0), 0)
    padded = torch.nn.functional.pad(shares, (0, 0, 0, -len(shares) % together))
    return padded.unflatten(0, (-1, together)).sum(1).t()


def logits_statistics(
    logits: torch.Tensor,  # (n, C), last dimension contiguous
    target: torch.Tensor,  # (n,) int64
    *,
    class_weight: torch.Tensor | None = None,
    smooth: bool = False,
    softcap: float = 0.0,
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """Partials [fields, splits, n] in float32 for :func:`finalize`, from stored logits."""
    n, n_classes = logits.shape
    tile = tile or configs.tile("logits_smoothing" if smooth else "logits", logits.device, logits.dtype)
    row_tiles, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.columns)
    count, per_split = configs.class_splits(row_tiles, class_tiles, 4 * configs.processors(logits.device), splits)
    partials = torch.empty(FIELDS[smooth], count, n, dtype=torch.float32, device=logits.device)
    if n:
        logits_statistics_kernel[(row_tiles * count,)](
            logits,
            class_weight,
            target,
            partials,
            n,
            n_classes,
            logits.stride(0),
            per_split,
            softcap or 1.0,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            SOFTCAP=bool(softcap),
            SMOOTH=smooth,
            HAS_WEIGHT=smooth and class_weight is not None,
            num_warps=tile.warps,
            enable_fp_fusion=True,
            num_stages=tile.stages,
        )
    return partials
