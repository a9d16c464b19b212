"""Backward of the head and its loss in one: residuals of a chunk of classes, and the products that belong to the BLAS.

Forward is ``statistics`` (no logits stored); it keeps lse and p_rest = 1 - p_y of each row. For the k rows that carry a
gradient s_i (the incoming gradient), and for one chunk of classes at a time,

    R_chunk = s * dl/dz        (k, chunk), in the inputs' dtype, as eager autograd stores it
    dW[chunk] = R_chunk^T H    dc[chunk] = sum_i R_chunk     written once each, accumulated in float32
    dH += R_chunk W[chunk]     accumulated in float32 over the chunks

With z after the cap, g its slope, T and A as in residual.py,

    r_c = (T e^(z_c - lse) - a_c) g_c,    r_y = (A - T p_rest) g_y.

Tile picture: one program computes one tile of H W[chunk]^T, turns it into residuals in registers and stores it.

              chunk of classes              Each chunk reads and writes dH once, so that few large chunks move less
    rows    [ R ][ R ][ R ]  (COLUMNS)      than many that the L2 holds: CHUNK_BYTES bounds R alone.
            [ R ][ R ][ R ]

Flops 2 k C d here and 4 k C d in the BLAS; bytes (k + C) d item, k C item written and read twice, and 8 k d a chunk.
"""

import torch
import triton
import triton.language as tl

from . import configs
from .arithmetic import exponential, grouped_tile
from .matmul_tile import dot_precision, logits_tile, operands

CHUNK_BYTES = 256 << 20  # of residuals
# torch.mm(out_dtype=) and torch.addmm(out_dtype=) came with torch 2.8. The latter refuses a float32 total before 2.10,
# which its schema does not tell.
MULTIPLIES_IN_FLOAT = "dtype" in torch.ops.aten.mm.overloads()
ADDS_IN_FLOAT = MULTIPLIES_IN_FLOAT and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)


@triton.jit
def residual_tile(
    z,
    g,
    w,
    classes,
    rows,
    inside,
    target,
    lse,
    p_rest,
    scale,
    mass,
    rest,
    share,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The scaled residuals of a tile of capped logits z; g is the cap's slope, w the class weights of the tile."""
    mass_row = tl.load(mass + rows, mask=inside, other=0.0)
    own = tl.load(rest + rows, mask=inside, other=0.0) - mass_row * tl.load(p_rest + rows, mask=inside, other=0.0)
    r = mass_row[:, None] * exponential(z - tl.load(lse + rows, mask=inside, other=0.0)[:, None])
    if SMOOTH:
        if HAS_WEIGHT:
            r -= share * w
        else:
            r -= share
    y = tl.load(target + rows, mask=inside, other=-1)
    r = tl.where(classes[None, :] == y[:, None], own[:, None], r)
    if SOFTCAP:
        r = r * g
    # A row without a gradient may hold NaN: it is replaced, not multiplied.
    factor = tl.load(scale + rows, mask=inside, other=0.0)
    return tl.where((factor != 0.0)[:, None], r * factor[:, None], 0.0)


@triton.jit(do_not_specialize=["k", "n_columns", "first_class"])
def residual_chunk_kernel(
    features,
    weight,
    bias,
    class_weight,
    target,
    lse,
    p_rest,
    scale,
    mass,
    rest,
    out,
    k,
    n_columns,
    first_class,
    d,
    stride_h,
    stride_w,
    stride_out,
    share,
    softcap,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[i, c] = scale_i r_i,first+c for the classes of a chunk; weight, bias and class_weight start at the chunk."""
    n_row_tiles = tl.cdiv(k, ROWS)
    row_tile, tile = grouped_tile(tl.program_id(0), n_row_tiles, tl.num_programs(0) // n_row_tiles, GROUP)
    rows = row_tile * ROWS + tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < k
    within = columns < n_columns
    z, g = logits_tile(
        features, weight, bias, row_tile, tile, k, n_columns, d, stride_h, stride_w, softcap,
        ROWS, COLUMNS, DEPTH, DESCRIPTOR, False, EVEN_DEPTH, HAS_BIAS, SOFTCAP, PRECISION,
    )  # fmt: skip
    w = z
    if SMOOTH and HAS_WEIGHT:
        w = tl.load(class_weight + columns, mask=within, other=0.0).to(tl.float32)[None, :]
    r = residual_tile(
        z,
        g,
        w,
        columns + first_class,
        rows,
        inside,
        target,
        lse,
        p_rest,
        scale,
        mass,
        rest,
        share,
        SOFTCAP,
        SMOOTH,
        HAS_WEIGHT,
    )
    place = out + rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(place, r.to(out.dtype.element_ty), mask=inside[:, None] & within[None, :])


def residual_chunk(
    out: torch.Tensor,  # (k, columns) of the dtype of features
    features: torch.Tensor,  # (k, d), last dimension contiguous
    weight: torch.Tensor,  # (columns, d), last dimension contiguous: the chunk's rows
    bias: torch.Tensor | None,  # (columns,)
    class_weight: torch.Tensor | None,  # (columns,), read only with smoothing
    rows: tuple[torch.Tensor, ...],  # target int64, and lse, p_rest, scale, mass, rest float32, each (k,)
    first_class: int,
    *,
    share: float = 0.0,  # label smoothing / C
    softcap: float = 0.0,
    tile: configs.Tile | None = None,
) -> None:
    """Fill ``out`` with the scaled residuals of the classes [first_class, first_class + columns)."""
    (k, columns), d = out.shape, features.shape[1]
    tile = tile or configs.tile("chunk", features.device, features.dtype)
    descriptor, pair = operands(tile.descriptor, (features, tile.rows, tile.depth), (weight, tile.columns, tile.depth))
    residual_chunk_kernel[(triton.cdiv(k, tile.rows) * triton.cdiv(columns, tile.columns),)](
        *pair,
        bias,
        class_weight,
        *rows,
        out,
        k,
        columns,
        first_class,
        d,
        features.stride(0),
        weight.stride(0),
        out.stride(0),
        share,
        softcap or 1.0,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=tile.group,
        DESCRIPTOR=descriptor,
        EVEN_DEPTH=d % tile.depth == 0,
        HAS_BIAS=bias is not None,
        SOFTCAP=bool(softcap),
        SMOOTH=share != 0.0,
        HAS_WEIGHT=share != 0.0 and class_weight is not None,
        PRECISION=dot_precision(features.dtype),
        num_warps=tile.warps,
        enable_fp_fusion=True,
        num_stages=tile.stages,
    )


def row_terms(
    scale: torch.Tensor,
    target: torch.Tensor,
    lse: torch.Tensor,
    p_rest: torch.Tensor,
    class_weight: torch.Tensor | None,
    label_smoothing: float,
    n_classes: int,
) -> tuple[torch.Tensor, ...]:
    """What :func:`residual_tile` reads of each row: target, lse, p_rest, scale, T and A, each (k,) and contiguous."""
    y = torch.where((target >= 0) & (target < n_classes), target, 0)
    share = label_smoothing / n_classes
    w_y = torch.ones_like(scale, dtype=torch.float64) if class_weight is None else class_weight.double()[y]
    total = n_classes if class_weight is None else class_weight.double().sum()
    mass, rest = (1.0 - label_smoothing) * w_y + share * total, share * (total - w_y)
    return y, lse.float().contiguous(), p_rest.float().contiguous(), scale.contiguous(), mass.float(), rest.float()


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in float32, from operands of any dtype, without widening them where the device can."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cpu or not MULTIPLIES_IN_FLOAT:
        return torch.mm(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


def write_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``out[:] = a @ b``, all of one dtype, summed in float32: on a GPU the BLAS rounds as it writes."""
    if a.is_cpu and a.dtype != torch.float32:
        out.copy_(product(a, b))
    else:
        torch.mm(a, b, out=out)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` for a float32 total: the BLAS adds as it writes, where this torch lets it."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif ADDS_IN_FLOAT and not a.is_cpu:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += product(a, b)


def backward(
    scale: torch.Tensor,  # (k,) float32 incoming gradients; 0 where the row has none
    features: torch.Tensor,  # (k, d), finite where scale is not 0 and 0 elsewhere
    weight: torch.Tensor,  # (C, d)
    bias: torch.Tensor | None,  # (C,)
    target: torch.Tensor,  # (k,) int64
    lse: torch.Tensor,  # (k,)
    p_rest: torch.Tensor,  # (k,) 1 - p_y
    class_weight: torch.Tensor | None,  # (C,)
    *,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    need_features: bool = True,
    need_weight: bool = True,
    need_bias: bool = True,
    tile: configs.Tile | None = None,
    chunk: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of features (k, d) in float32, of weight and bias in their dtypes; None where not needed."""
    (k, d), n_classes = features.shape, len(weight)
    share = label_smoothing / n_classes
    rows = row_terms(scale, target, lse, p_rest, class_weight, label_smoothing, n_classes)
    chunk = chunk or max(256, CHUNK_BYTES // (max(k, 1) * features.element_size()) // 256 * 256)
    buffer = torch.empty(k * min(chunk, n_classes), dtype=features.dtype, device=features.device)
    d_features = torch.zeros(k, d, dtype=torch.float32, device=features.device) if need_features else None
    made = torch.empty_like if k else torch.zeros_like
    d_weight = made(weight, memory_format=torch.contiguous_format) if need_weight else None
    d_bias = made(bias) if need_bias and bias is not None else None
    if k == 0:
        return d_features, d_weight, d_bias
    for first in range(0, n_classes, chunk):
        part = slice(first, min(first + chunk, n_classes))
        r = buffer[: k * (part.stop - first)].view(k, -1)
        residual_chunk(
            r,
            features,
            weight[part],
            None if bias is None else bias[part],
            None if class_weight is None else class_weight[part],
            rows,
            first,
            share=share,
            softcap=softcap,
            tile=tile,
        )
        if d_bias is not None:
            d_bias[part] = r.sum(0, dtype=torch.float32)
        if d_weight is not None:
            write_product(d_weight[part], r.t(), features)
        if d_features is not None:
            add_product(d_features, r, weight[part])
    return d_features, d_weight, d_bias
