"""The mean gradient of the head of a small minibatch, M = (1/n) R^T [H, 1], and b_i = r_i^T M [h_i, 1]: two launches.

``mean_kernel`` writes M, the bias's column, and the sum of squares of each tile of M; ``inner_kernel`` reads M for the
rows' inner products, and its first program adds the tiles' squares in their order. Both sum products of float32
numbers in float32 along the contracted dimension, and squares and inner products in float64: b is what is left where
the mean nearly cancels.

``finite_rows_kernel`` finds the rows that hold a number that is not finite, which count as zero gradients: the kernels
here and the Gram matrix's read its flags, in place of looking afterwards.

Tile picture: (CLASSES, WIDTH) of M a program, then ROWS rows.

    R^T [ . | . | . ]   x   [ H ]  ->  M, |M|^2       R [ . . ] x M  ->  (R M) * H summed along the row  ->  b
         n in steps of ROWS                              C in steps of CLASSES, d in steps of WIDTH

Flops 4 n C d. Bytes: every row of tiles of M reads n (C + d) item, every program of rows C d 4. That suits a few tiles,
where launches take the time. Larger minibatches go to the BLAS.
"""

import torch
import triton
import triton.language as tl

from .gram import broken_entries
from .matmul_tile import dot_precision

ROWS, CLASSES, WIDTH, FLAG_ROWS, FLAG_DEPTH = 32, 32, 32, 8, 256
MEAN_WARPS, INNER_WARPS = 4, 8  # Triton 3.8 spills at 4 in the second
MOST = 1 << 24  # n C d up to which two launches of small tiles are taken


@triton.jit(do_not_specialize=["n"])
def finite_rows_kernel(
    residual, features, finite, n, n_classes, d, stride_r, stride_h, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """finite[row] = 1 where no entry of either factor is a NaN or an infinity."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    count = broken_entries(residual, rows, inside, n_classes, stride_r, ROWS, DEPTH)
    count += broken_entries(features, rows, inside, d, stride_h, ROWS, DEPTH)
    tl.store(finite + rows, (count == 0).to(tl.uint8), mask=inside)


@triton.jit
def entries(x, rows, kept, columns, length, stride):
    """x[rows, columns] in float32, 0 in rows that are not kept."""
    mask = kept[:, None] & (columns < length)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def kept_rows(finite, rows, n, MASKED: tl.constexpr):
    """Which rows there are, and with MASKED are finite."""
    kept = rows < n
    if MASKED:
        kept = tl.load(finite + rows, mask=kept, other=0) != 0
    return kept


@triton.jit(do_not_specialize=["n"])
def mean_kernel(
    residual,
    features,
    finite,
    mean,
    mean_bias,
    squares,
    n,
    n_classes,
    d,
    stride_r,
    stride_h,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of M (C, d) and its sum of squares; programs of the first columns also their part of the bias."""
    classes = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((CLASSES, WIDTH), tl.float32)
    sums = tl.zeros((CLASSES,), tl.float32)
    for start in range(0, n, ROWS):
        rows = start + tl.arange(0, ROWS)
        kept = kept_rows(finite, rows, n, MASKED)
        r = entries(residual, rows, kept, classes, n_classes, stride_r)
        h = entries(features, rows, kept, columns, d, stride_h)
        acc = tl.dot(tl.trans(r), h, acc, input_precision=PRECISION)
        sums += tl.sum(r, 0)
    acc = acc / n
    within = (classes < n_classes)[:, None] & (columns < d)[None, :]
    tl.store(mean + classes.to(tl.int64)[:, None] * d + columns[None, :], acc, mask=within)
    wide = acc.to(tl.float64)
    square = tl.sum(tl.sum(wide * wide, 1), 0)
    if BIAS:
        if tl.program_id(1) == 0:
            sums = sums / n
            tl.store(mean_bias + classes, sums, mask=classes < n_classes)
            wide_sums = sums.to(tl.float64)
            square += tl.sum(wide_sums * wide_sums, 0)
    tl.store(squares + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), square)


@triton.jit(do_not_specialize=["n", "n_tiles"])
def inner_kernel(
    residual,
    features,
    finite,
    mean,
    mean_bias,
    squares,
    inner,
    target_sq,
    n,
    n_classes,
    d,
    n_tiles,
    stride_r,
    stride_h,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDTH: tl.constexpr,
    BIAS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """B of ROWS rows; the first program adds up the squares."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = kept_rows(finite, rows, n, MASKED)
    total = tl.zeros((ROWS,), tl.float64)
    for k in range(0, d, WIDTH):
        columns = k + tl.arange(0, WIDTH)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        for c in range(0, n_classes, CLASSES):
            classes = c + tl.arange(0, CLASSES)
            r = entries(residual, rows, kept, classes, n_classes, stride_r)
            m = entries(mean, classes, classes < n_classes, columns, d, d)
            acc = tl.dot(r, m, acc, input_precision=PRECISION)
        h = entries(features, rows, kept, columns, d, stride_h)
        total += tl.sum(acc.to(tl.float64) * h.to(tl.float64), 1)
    if BIAS:
        for c in range(0, n_classes, CLASSES):
            classes = c + tl.arange(0, CLASSES)
            r = entries(residual, rows, kept, classes, n_classes, stride_r)
            m = tl.load(mean_bias + classes, mask=classes < n_classes, other=0.0)
            total += tl.sum(r.to(tl.float64) * m.to(tl.float64)[None, :], 1)
    tl.store(inner + rows, total.to(tl.float32), mask=rows < n)
    if tl.program_id(0) == 0:
        square = tl.zeros((ROWS,), tl.float64)
        for start in range(0, n_tiles, ROWS):
            tile = start + tl.arange(0, ROWS)
            square += tl.load(squares + tile, mask=tile < n_tiles, other=0.0)
        tl.store(target_sq, tl.sum(square, 0).to(tl.float32))


def finite_rows(residual: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(n,) uint8: 1 where a row of residual (n, C) and of features (n, d), rows contiguous, is finite throughout."""
    n = len(residual)
    finite = torch.empty(n, dtype=torch.uint8, device=residual.device)
    if n:
        finite_rows_kernel[(triton.cdiv(n, FLAG_ROWS),)](
            residual,
            features,
            finite,
            n,
            residual.shape[1],
            features.shape[1],
            residual.stride(0),
            features.stride(0),
            ROWS=FLAG_ROWS,
            DEPTH=FLAG_DEPTH,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return finite


def mean_gradient(
    residual: torch.Tensor,  # (n, C), last dimension contiguous
    features: torch.Tensor,  # (n, d), last dimension contiguous
    finite: torch.Tensor | None,  # (n,) uint8 of finite_rows; None: all rows are
    *,
    bias: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float32 inner (n,), target_sq (), M (C, d) and the bias's column (C,), empty without a bias; n, C >= 1."""
    (n, n_classes), d = residual.shape, features.shape[1]
    grid = triton.cdiv(n_classes, CLASSES), max(triton.cdiv(d, WIDTH), 1)
    mean = torch.empty(n_classes, d, dtype=torch.float32, device=residual.device)
    mean_bias, inner, target_sq = mean.new_empty(n_classes if bias else 0), mean.new_empty(n), mean.new_empty(())
    squares = torch.empty(grid[0] * grid[1], dtype=torch.float64, device=residual.device)
    shared = {
        "ROWS": ROWS, "CLASSES": CLASSES, "WIDTH": WIDTH, "BIAS": bias, "MASKED": finite is not None,
        "PRECISION": dot_precision(torch.float32),
    }  # fmt: skip
    column = mean_bias if bias else None
    factors = residual, features, finite, mean, column, squares
    strides = residual.stride(0), features.stride(0)
    mean_kernel[grid](*factors, n, n_classes, d, *strides, **shared, num_warps=MEAN_WARPS, enable_fp_fusion=True)
    inner_kernel[(triton.cdiv(n, ROWS),)](
        *factors,
        inner,
        target_sq,
        n,
        n_classes,
        d,
        len(squares),
        *strides,
        **shared,
        num_warps=INNER_WARPS,
        enable_fp_fusion=True,
    )
    return inner, target_sq, mean, mean_bias
