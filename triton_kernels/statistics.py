"""Online statistics of the classes other than the target, in one pass over the classes; logits are not stored.

For row i with target y, over c != y (the reference c of arithmetic.py, here called ref, is an integer):

    m   = max z_c          s = sum e_c          s2 = sum (g_c e_c)^2          e_c = 2^(z_c log2 e - ref)

g_c = 1 - tanh^2 is the slope of the soft cap (1 without one). combine.py joins these with z_y into

    loss = log(1 + e^(m' - z_y) s)      ||r||^2 = (p_rest g_y)^2 + sum_c (g_c p_c)^2    p_rest = sum_{c != y} p_c

so that nothing cancels where p_y is close to 1. Label smoothing gives every class a share a_c = (eps / C) w_c of the
target, and sum_c g_c^2 (T p_c - a_c)^2 must not be expanded: a trained model has T p_c close to a_c. It is a least-
squares fit of e by w instead, kept as Welford and Chan do: with E = g e, V = g w over the classes seen so far

    amount = sum w     spread = sum w (ref - z log2 e)     rho = E.V / V.V     square = V.V     s2 = ||E - rho V||^2

and ||x E - k V||^2 = x^2 s2 + (x rho - k)^2 square for every x, k. Without smoothing V is 0, and s2 the sum of squares
above. Two parts merge with delta = rho' - rho: s2 + s2' + delta^2 square square' / (square + square'). C++ keeps the
same sums under the same names, relative to m and in natural logarithms.

Tile picture: program (row tile, split) keeps ROWS rows and walks its share of the class tiles.

                 classes of this split ->
            [ W0 ] [ W1 ] [ W2 ]             (COLUMNS, d), streamed through shared memory in steps of DEPTH
    rows    +-----+------+------+
    [ H ]   | acc |  acc |  acc |   -> m, s, s2 in registers -> partials [fields, splits, n]
            +-----+------+------+

GROUP row tiles walk the classes at the same time, so that W is read from DRAM about n / (ROWS * GROUP) times. There
are no atomics: each (split, row) is written by one program, and finalize adds the splits in order.

Flops 2 n C d. Bytes from DRAM at least (n + C) d item; requested from the cache by the programs (as counted by the
interpreter guard) per row tile and class tile (ROWS + COLUMNS) d item. Epilogue on sm_90: at most 11.5 instructions a
logit against 4096 flops a cycle, so at d >= 4096 the product dominates.

``logits_statistics_kernel`` is the same pass where the logits are stored already: it reads each once, n C item bytes.

With a projection P (sketch.py) the same pass sums g e P into ROWS x WIDTH more registers.

Exponentials are not stored for ``residual`` to be made of them. Where the model's forward has written its logits, as in
every training step, statistics and residual each read them, n C 2 item bytes; storing E would add a write. From
features and weight a product must write n C logits that both then read, 3 item; this kernel could write E instead for
residual to read, 2 item. That saves n C item of n C (3 item + 4) bytes with the float32 residuals: 0.17 of 3.8 ms
modelled on an H100 at 8192 x 32000 x 4096 in bfloat16, 3.1 of them the product. E would need each tile's reference
beside it, or a rescaling pass, and a second kernel for residuals in every option: not worth 4 %.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import FLOOR, LOG2E, MINUS_INFINITY, grouped_tile, reference_exponent, soft_cap
from .matmul_tile import dot_precision, logits_tile, operands

FIELDS = {False: 3, True: 7}  # of the partials: m, s, s2; smoothed m, s, s2, amount, spread, rho, square
WIDTH = 64  # columns of P that one launch projects onto


@triton.jit
def empty_state(ROWS: tl.constexpr, SMOOTH: tl.constexpr):
    """Of rows of which no class has been seen: m, ref, and the sums in the order of FIELDS."""
    zero = tl.zeros((ROWS,), tl.float32)
    state = tl.full((ROWS,), MINUS_INFINITY, tl.float32), tl.full((ROWS,), FLOOR, tl.float32) * LOG2E, zero, zero
    if SMOOTH:
        state = state + (zero, zero, zero, zero)
    return state


@triton.jit
def absorb(z, g, w, state, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr):
    """The state after the tile z (excluded entries -inf), then the tile's g e and g w and the sums' change of scale.

    g is the cap's slope; w holds the class weights, 0 where a class is excluded, and is read with smoothing only.
    """
    ref, s = state[1], state[2]
    m = tl.maximum(state[0], tl.max(z, 1))
    new = reference_exponent(m)
    scale = tl.exp2(ref - new)
    exponent = tl.fma(z, LOG2E, -new[:, None])
    e = tl.exp2(exponent)
    s = s * scale + tl.sum(e, 1)
    if SMOOTH:
        spread = state[5] + state[4] * (new - ref) + tl.sum(tl.where(w == 0.0, 0.0, -w * exponent), 1)
        amount = state[4] + tl.sum(w, 1)
    if SOFTCAP:
        e = e * g
        w = w * g
    if SMOOTH:
        square = tl.sum(w * w, 1)
        rho = tl.sum(e * w, 1) / tl.where(square > 0.0, square, 1.0)
        left = e - rho[:, None] * w
        rho, s2, square = merge_fit(
            state[6] * scale, state[3] * (scale * scale), state[7], rho, tl.sum(left * left, 1), square
        )
        state = m, new, s, s2, amount, spread, rho, square
    else:
        state = m, new, s, state[3] * (scale * scale) + tl.sum(e * e, 1)
    return state, e, w, scale


@triton.jit
def merge_fit(rho, s2, square, rho_, s2_, square_):
    """Least-squares fits of two disjoint sets of classes, joined: (rho, s2, square)."""
    total = square + square_
    share = tl.where(total > 0.0, square_ / tl.where(total > 0.0, total, 1.0), 0.0)
    delta = rho_ - rho
    return rho + delta * share, s2 + s2_ + delta * delta * (square * share), total


@triton.jit
def class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT: tl.constexpr):
    """The weights of a tile's classes, 0 where a row excludes them."""
    if HAS_WEIGHT:
        w = tl.load(class_weight + columns, mask=columns < n_classes, other=0.0).to(tl.float32)[None, :]
    else:
        w = 1.0
    return tl.where(excluded, 0.0, w)


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
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partials [fields, splits, n] of the logits cap(H W^T + c) over the classes other than each row's target.

    With a WIDTH also sums [1, splits, n, p] of g e P; [2, ...] with smoothing and a cap, the second of g w P.
    """
    n_row_tiles = tl.cdiv(n, ROWS)
    n_splits = tl.num_programs(0) // n_row_tiles
    row_tile, split = grouped_tile(tl.program_id(0), n_row_tiles, n_splits, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    y = tl.load(target + rows, mask=inside, other=0)
    y = tl.where((y >= 0) & (y < n_classes), y, 0).to(tl.int32)
    offset = tl.arange(0, COLUMNS)
    state = empty_state(ROWS, SMOOTH)
    if WIDTH:
        width = tl.arange(0, WIDTH)
        projected = tl.zeros((ROWS, WIDTH), tl.float32)
        if SMOOTH and SOFTCAP:
            weighted = tl.zeros((ROWS, WIDTH), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n_classes, COLUMNS))
    for tile in range(first, last):
        z, g = logits_tile(
            features, weight, bias, row_tile, tile, n, n_classes, d, stride_h, stride_w, softcap,
            ROWS, COLUMNS, DEPTH, DESCRIPTOR, EVEN_COLUMNS, EVEN_DEPTH, HAS_BIAS, SOFTCAP, PRECISION,
        )  # fmt: skip
        excluded = offset[None, :] == (y - tile * COLUMNS)[:, None]
        if not EVEN_COLUMNS:
            excluded = excluded | (offset >= n_classes - tile * COLUMNS)[None, :]
        z = tl.where(excluded, MINUS_INFINITY, z)
        columns = tile * COLUMNS + offset
        w = z
        if SMOOTH:
            w = class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT)
        state, e, w, scale = absorb(z, g, w, state, SOFTCAP, SMOOTH)
        if WIDTH:
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
        state, _, _, _ = absorb(z, g, w, state, SOFTCAP, SMOOTH)
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
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Partials [fields, splits, n] in float32 for :func:`finalize`, and with a projection sums [1 or 2, splits, n, p].

    The sums are of e P over the classes, relative to the reference of their split and row; the second ones, where a
    cap bends the smoothing's share of the target, of the weighted slopes w g P.
    """
    (n, d), (n_classes, p) = features.shape, (len(weight), 0) if projection is None else projection.shape
    tile = tile or configs.statistics_tile(
        features.device,
        features.dtype,
        n_classes,
        bias=bias is not None,
        softcap=bool(softcap),
        smooth=smooth,
        projected=projection is not None,
    )
    descriptor, pair = operands(tile.descriptor, (features, tile.rows, tile.depth), (weight, tile.columns, tile.depth))
    if tile.descriptor and not descriptor:
        tile = tile.with_pointers()
    row_tiles, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.columns)
    count, per_split = configs.class_splits(row_tiles, class_tiles, configs.processors(features.device), splits)
    partials = torch.empty(FIELDS[smooth], count, n, dtype=torch.float32, device=features.device)
    sums = None if projection is None else partials.new_empty(1 + (smooth and softcap != 0.0), count, n, p)
    if n == 0:
        return partials, sums
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
        WIDTH=0 if projection is None else WIDTH,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN_COLUMNS=n_classes % tile.columns == 0,
        EVEN_DEPTH=d % tile.depth == 0,
        HAS_BIAS=bias is not None,
        SOFTCAP=bool(softcap),
        SMOOTH=smooth,
        HAS_WEIGHT=smooth and class_weight is not None,
        PRECISION=dot_precision(features.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return partials, sums


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
            num_stages=tile.stages,
        )
    return partials
