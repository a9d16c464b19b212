"""Statistics and residuals of stored logits with few classes, each logit read once: two launches for a minibatch.

Up to MOST_CLASSES classes fit in one program's registers. So ``stored_rows_kernel`` needs no partial sums, no second
pass and no finishing launch: online.py's sums of the one tile, combine.py's outcome, and, where it is asked for,
residual.py's entries of the same registers and the features in float32, both 0 in rows that are not valid.

What a minibatch adds is one number over its rows, the unit s = n / (sum of the valid rows' masses), by which losses and
gradients become those of torch's ``reduction="mean"``. A mass is the class weight of a target that is not ignored, 1
without class weights. ``in_units_kernel`` sums the masses in every program, in float64 and in one order, and scales the
program's own rows.

Tile picture: a program owns ROWS rows and all of their classes, padded to COLUMNS.

              COLUMNS >= C                       DEPTH
    ROWS  [ z z z z z . . ]  ->  r, sums    [ h | h | h ]  ->  ||h||^2

Bytes: n (C (item + 4) + d (item + 4) + 34), then n (8 C + 30) and 6 n a program; the first is bound by bandwidth, and
both by their launch at small n.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import MINUS_INFINITY, exponential, mean_unit, soft_cap
from .combine import outcome
from .online import absorb, class_weights, empty_state

MOST_CLASSES = 4096  # that a program holds in registers
MOST_ROWS = 4096  # whose masses every program of in_units_kernel sums


@triton.jit
def squared_norms(features, rows, inside, d, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """(ROWS,) sums of the squared entries of each row."""
    square = tl.zeros((ROWS,), tl.float32)
    for k in range(0, d, DEPTH):
        columns = k + tl.arange(0, DEPTH)
        mask = inside[:, None] & (columns < d)[None, :]
        h = tl.load(features + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        h = h.to(tl.float32)
        square += tl.sum(h * h, 1)
    return square


@triton.jit(do_not_specialize=["n", "ignore_index"])
def stored_rows_kernel(
    logits,
    features,
    class_weight,
    target,
    loss_out,
    lse_out,
    residual_sq_out,
    feature_sq_out,
    correct_out,
    valid_out,
    mass_out,
    residual_out,
    features_out,
    n,
    n_classes,
    d,
    stride_z,
    stride_h,
    ignore_index,
    label_smoothing,
    softcap,
    plus,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    MASS: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """The statistics of ROWS rows; with MASS their masses, with FACTORS residuals (n, C) and features (n, d)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    label = tl.load(target + rows, mask=inside, other=0)
    in_range = (label >= 0) & (label < n_classes)
    ignored = label == ignore_index
    present = in_range & (label != ignore_index)
    y = tl.where(in_range, label, 0).to(tl.int32)
    w_y = 1.0
    mass = tl.where(ignored, 0.0, 1.0)
    if HAS_WEIGHT:
        w_y = tl.load(class_weight + y, mask=inside, other=0.0).to(tl.float32)
        mass = tl.where(ignored, 0.0, w_y)
    columns = tl.arange(0, COLUMNS)
    z_rows = logits + rows.to(tl.int64)[:, None] * stride_z
    within = inside[:, None] & (columns < n_classes)[None, :]
    z = tl.load(z_rows + columns[None, :], mask=within, other=0.0).to(tl.float32)
    z_y = tl.load(logits + rows.to(tl.int64) * stride_z + y, mask=inside, other=0.0).to(tl.float32)
    g, g_y = z, 1.0
    if SOFTCAP:
        z, g = soft_cap(z, softcap)
        z_y, g_y = soft_cap(z_y, softcap)
    excluded = (columns[None, :] == y[:, None]) | (columns >= n_classes)[None, :]
    z = tl.where(excluded, MINUS_INFINITY, z)
    w = z
    if SMOOTH:
        w = class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT)
    state, _, _, _, _ = absorb(z, g, w, empty_state(ROWS, SMOOTH), SOFTCAP, SMOOTH)
    square = tl.full((ROWS,), 1.0, tl.float32)
    if HAS_FEATURES:
        square = squared_norms(features, rows, inside, d, stride_h, ROWS, DEPTH) + plus
    loss, lse, residual_sq, _, leads, valid, own, factor = outcome(
        state, z_y, g_y, w_y, ignored, present, square, n_classes, label_smoothing, SMOOTH
    )
    tl.store(loss_out + rows, loss, mask=inside)
    tl.store(lse_out + rows, lse, mask=inside)
    tl.store(residual_sq_out + rows, residual_sq, mask=inside)
    tl.store(feature_sq_out + rows, square, mask=inside)
    tl.store(correct_out + rows, (valid & leads).to(tl.uint8), mask=inside)
    tl.store(valid_out + rows, valid.to(tl.uint8), mask=inside)
    if MASS:
        tl.store(mass_out + rows, mass, mask=inside)
    if FACTORS:
        r = exponential(z - lse[:, None])
        if HAS_WEIGHT or SMOOTH:
            r = r * factor[:, None]
        if SMOOTH:
            r = r - (label_smoothing / n_classes) * w
        if SOFTCAP:
            r = r * g
        r = tl.where(columns[None, :] == y[:, None], own[:, None], r)
        place = residual_out + rows.to(tl.int64)[:, None] * n_classes + columns[None, :]
        tl.store(place, tl.where(valid[:, None], r, 0.0), mask=within)
        for k in range(0, d, DEPTH):
            depth = k + tl.arange(0, DEPTH)
            there = inside[:, None] & (depth < d)[None, :]
            entry = features + rows.to(tl.int64)[:, None] * stride_h + depth[None, :]
            h = tl.load(entry, mask=there & valid[:, None], other=0.0).to(tl.float32)
            tl.store(features_out + rows.to(tl.int64)[:, None] * d + depth[None, :], h, mask=there)


@triton.jit(do_not_specialize=["n"])
def in_units_kernel(
    mass,
    valid,
    correct,
    loss,
    residual_sq,
    residual,
    scaled_out,
    residual_sq_out,
    scale_out,
    hits_out,
    n,
    n_classes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The unit s, how many rows are correct and valid, s loss, s^2 ||r||^2, and s r in the place of r."""
    total = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int32)
    hits = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        row = start + tl.arange(0, BLOCK)
        live = tl.load(valid + row, mask=row < n, other=0) != 0
        total += tl.load(mass + row, mask=live, other=0.0).to(tl.float64)
        counts += live.to(tl.int32)
        hits += tl.load(correct + row, mask=row < n, other=0).to(tl.int32)
    scale = mean_unit(n, tl.sum(total, 0))
    if tl.program_id(0) == 0:
        tl.store(scale_out, scale)
        tl.store(hits_out, tl.sum(hits, 0).to(tl.int64))
        tl.store(hits_out + 1, tl.sum(counts, 0).to(tl.int64))
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    tl.store(scaled_out + rows, tl.load(loss + rows, mask=inside, other=0.0) * scale, mask=inside)
    square = tl.load(residual_sq + rows, mask=inside, other=0.0)
    tl.store(residual_sq_out + rows, square * (scale * scale), mask=inside)
    if COLUMNS:
        for start in range(0, n_classes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            within = inside[:, None] & (columns < n_classes)[None, :]
            place = residual + rows.to(tl.int64)[:, None] * n_classes + columns[None, :]
            tl.store(place, tl.load(place, mask=within, other=0.0) * scale, mask=within)


def row_tile(n_classes: int) -> tuple[int, int, int]:
    """(ROWS, COLUMNS, warps) of a program: 2048 entries or one row."""
    columns = max(triton.next_power_of_2(n_classes), 16)
    return max(1, min(16, 2048 // columns)), columns, 4 if columns <= 2048 else 16


def register_limit(columns: int, warps: int) -> dict[str, int]:
    """A launch option for long rows: all the registers that a thread of ``warps`` warps can have.

    Without it the assembler spills a word or two, so that one program more has room beside the others.
    """
    return {} if columns <= 1024 or torch.version.hip else {"maxnreg": min(255, 2048 // warps)}


def stored_rows(
    logits: torch.Tensor,  # (n, C), C <= MOST_CLASSES, last dimension contiguous
    target: torch.Tensor,  # (n,) int64
    features: torch.Tensor | None,  # (n, d), last dimension contiguous
    *,
    class_weight: torch.Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    plus: float = 0.0,  # to the features' squared norms
    mass: bool = False,
    factors: bool = False,
) -> tuple[torch.Tensor, ...]:
    """(n,) loss, lse, residual_sq, feature_sq, correct, valid. With ``mass`` three more.

    These are mass (n,) and with ``factors`` the residual (n, C) and the features (n, d) in float32, else empty.
    """
    n, n_classes = logits.shape
    floats = [torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(4 + mass)]
    flags = [torch.empty(n, dtype=torch.uint8, device=logits.device) for _ in range(2)]
    shapes = (logits.shape, features.shape) if factors and features is not None else ((0, 0), (0, 0))
    wide = [torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in shapes]
    rows, columns, warps = row_tile(n_classes)
    if n:
        stored_rows_kernel[(triton.cdiv(n, rows),)](
            logits,
            features,
            class_weight,
            target,
            *floats[:4],
            *flags,
            floats[4] if mass else None,
            *wide,
            n,
            n_classes,
            0 if features is None else features.shape[1],
            logits.stride(0),
            0 if features is None else features.stride(0),
            ignore_index,
            label_smoothing,
            softcap or 1.0,
            plus,
            ROWS=rows,
            COLUMNS=columns,
            DEPTH=max(128, 2048 // rows),
            HAS_FEATURES=features is not None,
            SOFTCAP=bool(softcap),
            SMOOTH=label_smoothing != 0.0,
            HAS_WEIGHT=class_weight is not None,
            MASS=mass,
            FACTORS=factors and features is not None,
            num_warps=warps,
            enable_fp_fusion=True,
            **register_limit(columns, warps),
        )
    found = (*floats[:4], flags[0].view(torch.bool), flags[1].view(torch.bool))
    return (*found, floats[4], *wide) if mass else found


UNIT_ROWS, UNIT_COLUMNS, UNIT_BLOCK = 8, 256, 1024


def in_units(
    mass: torch.Tensor,  # (n,) float32, n <= MOST_ROWS
    valid: torch.Tensor,  # (n,) bool
    correct: torch.Tensor,  # (n,) bool
    loss: torch.Tensor,  # (n,) float32
    residual_sq: torch.Tensor,  # (n,) float32
    residual: torch.Tensor,  # (n, C) float32, contiguous: scaled in place; may be empty
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """() the unit, (2,) int64 the correct rows and the valid ones, (n,) the loss in that unit and (n,) residual_sq."""
    n = len(mass)
    scale, hits = mass.new_empty(()), valid.new_empty(2, dtype=torch.int64)
    scaled, squares = torch.empty_like(loss), torch.empty_like(residual_sq)
    in_units_kernel[(max(triton.cdiv(n, UNIT_ROWS), 1),)](
        mass,
        valid.view(torch.uint8),
        correct.view(torch.uint8),
        loss,
        residual_sq,
        residual,
        scaled,
        squares,
        scale,
        hits,
        n,
        residual.shape[1],
        ROWS=UNIT_ROWS,
        COLUMNS=UNIT_COLUMNS if residual.numel() else 0,
        BLOCK=UNIT_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return scale, hits, scaled, squares
