"""The residual r = dl / dz of every row from stored logits and their lse, with the target's entry free of cancellation.

With the soft target t_y = ((1 - eps) + eps / C) w_y, t_c = a_c = (eps / C) w_c and T = (1 - eps) w_y + (eps / C) sum w:

    c != y:  r_c = (T p_c - a_c) g_c          p_c = exp(z_c - lse), z after the cap, g = 1 - (z / cap)^2
    c  = y:  r_y = (A - T p_rest) g_y         p_rest = sum_{c != y} p_c,  A = sum_{c != y} a_c

p_y - 1 would lose everything once 1 - p_y < 2^-24; p_rest is a sum of positive terms. So the row must be summed before
its target entry is known: ``residual_kernel`` writes all other entries and the sums of its share of the classes, and
``residual_target_kernel`` adds the shares in order, writes the n target entries, and clears the rows that are not valid
(no target, or a logit or lse that makes the loss infinite). Clearing reads nothing and is rare.

Tile picture: program (row tile, split) walks its class tiles; every entry is written exactly once by one program.

    rows  [ z | z | z ] -> [ r | r | r ]    and  [splits, n] sums of p (and of w, and a flag, with smoothing)

Bytes: n C (item + 4) + n (16 + 4 splits); about 8 flops an entry: bandwidth-bound. Offsets are 64-bit.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import exponential, soft_cap


@triton.jit(do_not_specialize=["n", "tiles_per_split", "ignore_index"])
def residual_kernel(
    logits,
    lse,
    class_weight,
    weight_sum,
    target,
    out,
    sums,
    n,
    n_classes,
    stride_z,
    stride_out,
    tiles_per_split,
    ignore_index,
    label_smoothing,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """All entries but the target's; sums[field, split, row] of p, with smoothing also of w and of broken entries."""
    n_row_tiles = tl.cdiv(n, ROWS)
    n_splits = tl.num_programs(0) // n_row_tiles
    row_tile = tl.program_id(0) % n_row_tiles
    split = tl.program_id(0) // n_row_tiles
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    y = tl.load(target + rows, mask=inside, other=0)
    present = (y >= 0) & (y < n_classes) & (y != ignore_index)
    y = tl.where(present, y, 0).to(tl.int32)
    lse_row = tl.load(lse + rows, mask=inside, other=0.0).to(tl.float32)
    share = label_smoothing / n_classes
    mass = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_WEIGHT:
        w_y = tl.load(class_weight + y, mask=inside, other=0.0).to(tl.float32)
        mass = w_y
        if SMOOTH:
            mass = (1.0 - label_smoothing) * w_y + share * tl.load(weight_sum)
    p_rest = tl.zeros((ROWS,), tl.float32)
    amount = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.float32)
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(n_classes, COLUMNS))
    for tile in range(first, last):
        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (columns < n_classes)[None, :]
        z = tl.load(logits + rows.to(tl.int64)[:, None] * stride_z + columns[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        g = z
        if SOFTCAP:
            z, g = soft_cap(z, softcap)
        other = mask & (columns[None, :] != y[:, None])
        p = exponential(z - lse_row[:, None])
        p_rest += tl.sum(tl.where(other, p, 0.0), 1)
        r = mass[:, None] * p
        if SMOOTH:
            w = tl.full((1, COLUMNS), 1.0, tl.float32)
            if HAS_WEIGHT:
                w = tl.load(class_weight + columns, mask=columns < n_classes, other=0.0).to(tl.float32)[None, :]
            r -= share * w
            amount += tl.sum(tl.where(other, w, 0.0), 1)
            wrong = other & (w != 0.0) & ((tl.abs(z) < float("inf")) == 0)
            broken += tl.sum(tl.where(wrong, 1.0, 0.0), 1)
        if SOFTCAP:
            r = r * g
        place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
        tl.store(place, tl.where(present[:, None], r, 0.0).to(out.dtype.element_ty), mask=other)
    part = sums + split.to(tl.int64) * n + rows
    tl.store(part, p_rest, mask=inside)
    if SMOOTH:
        field = n_splits.to(tl.int64) * n
        tl.store(part + field, amount, mask=inside)
        tl.store(part + 2 * field, broken, mask=inside)


@triton.jit(do_not_specialize=["n", "n_splits", "ignore_index"])
def residual_target_kernel(
    logits,
    lse,
    class_weight,
    target,
    out,
    sums,
    n,
    n_splits,
    n_classes,
    stride_z,
    stride_out,
    ignore_index,
    label_smoothing,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The target's entry of each row; rows that are not valid become 0."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    field = tl.cast(n_splits, tl.int64) * n
    p_rest = tl.zeros((ROWS,), tl.float32)
    amount = tl.zeros((ROWS,), tl.float32)
    broken = tl.zeros((ROWS,), tl.float32)
    for split in range(0, n_splits):
        part = sums + tl.cast(split, tl.int64) * n + rows
        p_rest += tl.load(part, mask=inside, other=0.0)
        if SMOOTH:
            amount += tl.load(part + field, mask=inside, other=0.0)
            broken += tl.load(part + 2 * field, mask=inside, other=0.0)
    y = tl.load(target + rows, mask=inside, other=0)
    present = (y >= 0) & (y < n_classes) & (y != ignore_index)
    y = tl.where(present, y, 0)
    z = tl.load(logits + rows * stride_z + y, mask=inside, other=0.0).to(tl.float32)
    g = 1.0
    if SOFTCAP:
        z, g = soft_cap(z, softcap)
    w_y = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_WEIGHT:
        w_y = tl.load(class_weight + y, mask=inside, other=0.0).to(tl.float32)
    share = label_smoothing / n_classes
    t_y = (1.0 - label_smoothing + share) * w_y
    rest = share * amount
    lse_row = tl.load(lse + rows, mask=inside, other=0.0).to(tl.float32)
    finite = (tl.abs(lse_row) < float("inf")) & ((tl.abs(z) < float("inf")) | (t_y == 0.0)) & (broken == 0.0)
    keep = present & finite
    r = tl.where(keep, (rest - (t_y + rest) * p_rest) * g, 0.0)
    tl.store(out + rows * stride_out + y, r.to(out.dtype.element_ty), mask=inside)
    clear = inside & present & (finite == 0)
    if tl.max(clear.to(tl.int32), 0) > 0:
        zero = tl.zeros((ROWS, COLUMNS), tl.float32).to(out.dtype.element_ty)
        for start in range(0, n_classes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = clear[:, None] & (columns < n_classes)[None, :] & (columns[None, :] != y[:, None])
            tl.store(out + rows[:, None] * stride_out + columns[None, :], zero, mask=mask)


ROWS, COLUMNS = 16, 256


def residual(
    logits: torch.Tensor,  # (n, C), last dimension contiguous
    target: torch.Tensor,  # (n,) int64
    lse: torch.Tensor,  # (n,) of the capped logits
    *,
    class_weight: torch.Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.float32,
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> torch.Tensor:
    """(n, C) residual in ``dtype``; 0 where the row is not valid."""
    n, n_classes = logits.shape
    tile = tile or configs.tile("residual", logits.device, logits.dtype)
    out = torch.empty(n, n_classes, dtype=dtype, device=logits.device)
    if n == 0:
        return out
    smooth = label_smoothing != 0.0
    row_tiles, class_tiles = triton.cdiv(n, tile.rows), triton.cdiv(n_classes, tile.columns)
    count, per_split = configs.class_splits(row_tiles, class_tiles, 4 * configs.processors(logits.device), splits)
    sums = torch.empty(3 if smooth else 1, count, n, dtype=torch.float32, device=logits.device)
    weight_sum = class_weight.sum(dtype=torch.float32) if smooth and class_weight is not None else None
    options = {"SOFTCAP": bool(softcap), "SMOOTH": smooth, "HAS_WEIGHT": class_weight is not None}
    residual_kernel[(row_tiles * count,)](
        logits,
        lse,
        class_weight,
        weight_sum,
        target,
        out,
        sums,
        n,
        n_classes,
        logits.stride(0),
        out.stride(0),
        per_split,
        ignore_index,
        label_smoothing,
        softcap or 1.0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        num_warps=tile.warps,
        enable_fp_fusion=True,
        num_stages=tile.stages,
        **options,
    )
    residual_target_kernel[(triton.cdiv(n, ROWS),)](
        logits,
        lse,
        class_weight,
        target,
        out,
        sums,
        n,
        count,
        n_classes,
        logits.stride(0),
        out.stride(0),
        ignore_index,
        label_smoothing,
        softcap or 1.0,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
        enable_fp_fusion=True,
        **options,
    )
    return out
