"""One tile of a product A B^T of two matrices of rows, and of the logits made of it: every kernel's main loop.

    rows of A  [ A_i ]  (ROWS, length)          both streamed through shared memory in steps of DEPTH
    rows of B  [ B_j ]  (COLUMNS, length)       -> A_i B_j^T in float32 registers, (ROWS, COLUMNS)

The operands are pointers, or tensor descriptors (TMA) where the table says so and base and row stride are multiples of
16 bytes; a descriptor gives zeros past the end. A pointer's rows past the end repeat row 0: a clamp before the loop is
cheaper than a mask inside it. So either way entries past the end are finite where row 0 is, and callers mask them.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .arithmetic import soft_cap


@triton.jit
def product(
    a,
    b,
    acc,
    i,
    j,
    n_a,
    n_b,
    length,
    stride_a,
    stride_b,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What is in acc, plus A_i B_j^T for row tiles i of a (n_a, length) and j of b (n_b, length)."""
    depth = tl.arange(0, DEPTH)
    if not DESCRIPTOR:
        rows = i * ROWS + tl.arange(0, ROWS)
        left = a + (tl.where(rows < n_a, rows, 0).to(tl.int64) * stride_a)[:, None] + depth[None, :]
        columns = j * COLUMNS + tl.arange(0, COLUMNS)
        if not EVEN_COLUMNS:
            columns = tl.where(columns < n_b, columns, 0)
        right = b + (columns.to(tl.int64) * stride_b)[None, :] + depth[:, None]
        acc = pointed_product(left, right, acc, length, DEPTH, EVEN_DEPTH, PRECISION)
    else:
        for k in range(0, length, DEPTH):
            acc = tl.dot(a.load([i * ROWS, k]), b.load([j * COLUMNS, k]).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pointed_product(left, right, acc, length, DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    """What is in acc, plus the product of rows and columns of this length; left and right point to their beginnings."""
    depth = tl.arange(0, DEPTH)
    for k in range(0, length, DEPTH):
        if EVEN_DEPTH:
            x = tl.load(left + k)
            y = tl.load(right + k)
        else:
            x = tl.load(left + k, mask=(k + depth < length)[None, :], other=0.0)
            y = tl.load(right + k, mask=(k + depth < length)[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def logits_tile(
    features,
    weight,
    bias,
    row_tile,
    tile,
    n,
    n_classes,
    d,
    stride_h,
    stride_w,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(z, g): one tile of the capped logits H W^T + c and the cap's slope, which without a cap nobody reads."""
    z = tl.zeros((ROWS, COLUMNS), tl.float32)
    z = product(
        features, weight, z, row_tile, tile, n, n_classes, d, stride_h, stride_w,
        ROWS, COLUMNS, DEPTH, DESCRIPTOR, EVEN_COLUMNS, EVEN_DEPTH, PRECISION,
    )  # fmt: skip
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    return capped_logits(z, bias, columns, n_classes, softcap, EVEN_COLUMNS, HAS_BIAS, SOFTCAP)


@triton.jit
def capped_logits(
    z,
    bias,
    columns,
    n_classes,
    softcap,
    EVEN_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """(z, g): the products z with their columns' bias and the cap, and the cap's slope, not read without a cap."""
    if HAS_BIAS:
        if not EVEN_COLUMNS:
            columns = tl.where(columns < n_classes, columns, 0)
        z += tl.load(bias + columns).to(tl.float32)[None, :]
    g = z
    if SOFTCAP:
        z, g = soft_cap(z, softcap)
    return z, g


@triton.jit
def halves(x):
    """The left and the right columns of x."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def quarters(x):
    """Four slices of the columns of x, in order."""
    left, right = halves(x)
    a, b = halves(left)
    c, d = halves(right)
    return a, b, c, d


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 operands are multiplied: as torch.set_float32_matmul_precision says for torch.mm."""
    if dtype != torch.float32:
        return "tf32"
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def operands(
    wanted: bool,  # descriptors, where these matrices allow them
    *matrices: tuple[torch.Tensor, int, int],  # (n, length), last dimension contiguous, and its tile
) -> tuple[bool, list[torch.Tensor | TensorDescriptor]]:
    """Whether descriptors are used, and what the kernel is given for each matrix."""
    tensors = [tensor for tensor, _, _ in matrices]
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
    if not (wanted and aligned and all(t.numel() for t in tensors)):  # a descriptor has no empty dim
        return False, tensors
    return True, [TensorDescriptor.from_tensor(tensor, [rows, depth]) for tensor, rows, depth in matrices]
