"""Inner products of the per-sample last-layer gradients: K = (R R^T) * (H H^T + b), b = 1 for a head with bias.

g_i = r_i (x) [h_i, 1] is never formed: g_i . g_j = (r_i . r_j)(h_i . h_j + b). Both products are accumulated in float32
for one tile of K and multiplied in registers, so neither (n, n) factor exists in memory.

Tile picture: K is symmetric, so only tiles (i, j) with j <= i are computed; each is stored, and its mirror.

    j ->  0   1   2           program pid -> (i, j) of the triangle
    i 0 [ D ]                 acc_r += R_i[:, k] R_j[:, k]^T     over C in steps of DEPTH
      1 [ x ][ D ]            acc_h += H_i[:, k] H_j[:, k]^T     over d in steps of DEPTH
      2 [ x ][ x ][ D ]       K_ij = acc_r * (acc_h + b);  K_ji = K_ij^T

A row of R or H with an entry that is not finite counts as a zero gradient, and it reaches no other row's entries. How
such rows are known:

* The caller says that there are none.
* The caller hands in a flag for each row (mean.py finds them). Entries are cleared as they are stored, which saves a
  small minibatch a launch.
* Else by K_ii, which is not finite for such a row. The diagonal tiles write one flag a row. ``gram_confirm_kernel``
  takes the flag back from rows that are finite and merely overflowed. ``gram_clear_kernel`` clears the flagged rows and
  columns. Both usually read n bytes and write nothing.

Flops n (n + ROWS)(C + d); bytes from DRAM at least n (C item_R + d item_H) + 4 n^2; requested by the programs
2 ROWS (C item_R + d item_H) a tile, 4 n^2 stored in all. Few rows make few tiles (36 at n = 1024, ROWS = 128), so a
launch that would leave processors idle takes the ``gram_small`` row of the table.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import triangle_tile
from .matmul_tile import dot_precision, operands, product


@triton.jit(do_not_specialize=["n"])  # a row stride that is known to be aligned saves registers
def gram_kernel(
    residual,
    features,
    gram,
    flags,
    n,
    n_classes,
    d,
    stride_r,
    stride_h,
    stride_k,
    plus,
    ROWS: tl.constexpr,
    DEPTH_R: tl.constexpr,
    DEPTH_H: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_R: tl.constexpr,
    EVEN_H: tl.constexpr,
    PRECISION_R: tl.constexpr,
    PRECISION_H: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """One tile of the lower triangle and its mirror.

    FLAGS: "none"; "clear", 0 where flags[row] or flags[column] is 0; "find", flags[row] = 1 where the row's own product
    is not finite.
    """
    i, j = triangle_tile(tl.program_id(0))
    acc = tl.zeros((ROWS, ROWS), tl.float32)
    acc = product(
        residual, residual, acc, i, j, n, n, n_classes, stride_r, stride_r,
        ROWS, ROWS, DEPTH_R, DESCRIPTOR, False, EVEN_R, PRECISION_R,
    )  # fmt: skip
    other = tl.zeros((ROWS, ROWS), tl.float32)
    other = product(
        features, features, other, i, j, n, n, d, stride_h, stride_h,
        ROWS, ROWS, DEPTH_H, DESCRIPTOR, False, EVEN_H, PRECISION_H,
    )  # fmt: skip
    acc = acc * (other + plus)
    rows = i * ROWS + tl.arange(0, ROWS)
    columns = j * ROWS + tl.arange(0, ROWS)
    if FLAGS == "clear":
        kept = tl.load(flags + rows, mask=rows < n, other=0) != 0
        acc = tl.where(kept[:, None] & (tl.load(flags + columns, mask=columns < n, other=0) != 0)[None, :], acc, 0.0)
    # Entries on and below the diagonal, then the mirror of those below: a tile's own rounding need not be symmetric.
    mask = (rows[:, None] >= columns[None, :]) & (rows < n)[:, None]
    tl.store(gram + rows.to(tl.int64)[:, None] * stride_k + columns[None, :], acc, mask=mask)
    mask = (columns[:, None] < rows[None, :]) & (rows < n)[None, :]
    tl.store(gram + columns.to(tl.int64)[:, None] * stride_k + rows[None, :], tl.trans(acc), mask=mask)
    if FLAGS == "find":
        if i == j:
            own = tl.sum(tl.where(rows[:, None] == columns[None, :], acc, 0.0), 1)
            tl.store(flags + rows, ((tl.abs(own) < float("inf")) == 0).to(tl.uint8), mask=rows < n)


@triton.jit
def broken_entries(x, rows, flagged, length, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Entries that are not finite in each flagged row of x (n, length)."""
    count = tl.zeros((ROWS,), tl.int32)
    for k in range(0, length, DEPTH):
        columns = k + tl.arange(0, DEPTH)
        mask = flagged[:, None] & (columns < length)[None, :]
        entry = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0)
        count += tl.sum(((tl.abs(entry.to(tl.float32)) < float("inf")) == 0).to(tl.int32), 1)
    return count


@triton.jit(do_not_specialize=["n"])
def gram_confirm_kernel(
    residual, features, broken, n, n_classes, d, stride_r, stride_h, ROWS: tl.constexpr, DEPTH: tl.constexpr
):
    """Keep a flag only where a factor of the row is not finite."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    flagged = tl.load(broken + rows, mask=rows < n, other=0) != 0
    if tl.max(flagged.to(tl.int32), 0) > 0:
        count = broken_entries(residual, rows, flagged, n_classes, stride_r, ROWS, DEPTH)
        count += broken_entries(features, rows, flagged, d, stride_h, ROWS, DEPTH)
        tl.store(broken + rows, (count > 0).to(tl.uint8), mask=flagged)


@triton.jit(do_not_specialize=["n", "stride_k"])
def gram_clear_kernel(gram, broken, n, stride_k, ROWS: tl.constexpr):
    """Zero in every row and column that is flagged."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    bad_row = tl.load(broken + rows, mask=rows < n, other=0) != 0
    bad_column = tl.load(broken + columns, mask=columns < n, other=0) != 0
    if tl.max(bad_row.to(tl.int32), 0) + tl.max(bad_column.to(tl.int32), 0) > 0:
        mask = (bad_row[:, None] | bad_column[None, :]) & (rows < n)[:, None] & (columns < n)[None, :]
        place = gram + rows.to(tl.int64)[:, None] * stride_k + columns[None, :]
        tl.store(place, tl.zeros((ROWS, ROWS), tl.float32), mask=mask)


CONFIRM_ROWS, CONFIRM_DEPTH, CLEAR_ROWS = 16, 256, 64


def gram(
    residual: torch.Tensor,  # (n, C), last dimension contiguous
    features: torch.Tensor,  # (n, d), last dimension contiguous
    *,
    bias: bool = True,
    tile: configs.Tile | None = None,
    finite: torch.Tensor | bool = False,  # (n,) uint8, 0 in broken rows; True: there is none; False: not known
) -> torch.Tensor:
    """(n, n) float32, symmetric to the bit; rows and columns of broken samples are 0."""
    (n, n_classes), d = residual.shape, features.shape[1]
    dtype = residual.dtype if residual.dtype.itemsize > features.dtype.itemsize else features.dtype
    if tile is None:
        tile = configs.tile("gram", residual.device, dtype)
        count = triton.cdiv(n, tile.rows)
        if count * (count + 1) // 2 < configs.processors(residual.device):
            tile = configs.tile("gram_small", residual.device, dtype)
    out = torch.empty(n, n, dtype=torch.float32, device=residual.device)
    if n == 0:
        return out
    flags = finite if isinstance(finite, torch.Tensor) else None
    if finite is False:
        flags = torch.empty(n, dtype=torch.uint8, device=residual.device)
    # A step spans the same bytes of either matrix, so that one shared-memory budget holds for mixed dtypes.
    depth_r, depth_h = (tile.depth * dtype.itemsize // x.element_size() for x in (residual, features))
    descriptor, pair = operands(tile.descriptor, (residual, tile.rows, depth_r), (features, tile.rows, depth_h))
    count = triton.cdiv(n, tile.rows)
    gram_kernel[(count * (count + 1) // 2,)](
        *pair,
        out,
        flags,
        n,
        n_classes,
        d,
        residual.stride(0),
        features.stride(0),
        n if n > 1 else 16,
        float(bias),
        ROWS=tile.rows,
        DEPTH_R=depth_r,
        DEPTH_H=depth_h,
        DESCRIPTOR=descriptor,
        EVEN_R=n_classes % depth_r == 0,
        EVEN_H=d % depth_h == 0,
        PRECISION_R=dot_precision(residual.dtype),
        PRECISION_H=dot_precision(features.dtype),
        FLAGS="none" if flags is None else "find" if finite is False else "clear",
        num_warps=tile.warps,
        enable_fp_fusion=True,
        num_stages=tile.stages,
    )
    if finite is not False:
        return out
    gram_confirm_kernel[(triton.cdiv(n, CONFIRM_ROWS),)](
        residual,
        features,
        flags,
        n,
        n_classes,
        d,
        residual.stride(0),
        features.stride(0),
        ROWS=CONFIRM_ROWS,
        DEPTH=CONFIRM_DEPTH,
        num_warps=4,
        enable_fp_fusion=True,
    )
    clear = triton.cdiv(n, CLEAR_ROWS)
    gram_clear_kernel[(clear, clear)](out, flags, n, out.stride(0), ROWS=CLEAR_ROWS, num_warps=4, enable_fp_fusion=True)
    return out
