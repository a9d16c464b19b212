"""``gradient_gram``: the inner products of all per-sample last-layer gradients, K = (R R^T) o (H H^T + 1).

On the CPU one native kernel computes one triangle block by block: both products, the bias's one, their product, and the
write to the block's place and to its mirror image, so K is symmetric bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp import _native, reference
from selbp.ops import _triton
from selbp.ops._checks import (
    accumulate_dtype,
    check_floating,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    flag,
)
from selbp.ops._library import define
from selbp.ops._threads import native_threads

_BLOCK = 64  # rows per block of the native kernel, whose scratch holds whole blocks


def gradient_gram(
    residual: Tensor,  # (n, C)
    features: Tensor,  # (n, d)
    *,
    bias: bool = True,
) -> Tensor:
    """Gram matrix of the per-sample last-layer gradients, K_ij = (r_i . r_j)(h_i . h_j + 1).

    Parameters
    ----------
    residual : Tensor
        (n, C) gradient of each sample's loss with respect to the logits.
    features : Tensor
        (n, d) input of the head, in the dtype of ``residual``.
    bias : bool
        Whether the head has a bias (the + 1).

    Returns
    -------
    Tensor
        (n, n), symmetric bit for bit; float64 for float64 inputs, else float32 with float32 accumulation (bfloat16 and
        float16 inputs are widened first: a Gram matrix kept in bfloat16 lets a solver claim a residual of 0). A row
        with a NaN or an infinity in either input counts as a zero gradient.

    Raises
    ------
    TypeError
        An input is not a floating tensor, or their dtypes differ.
    ValueError
        An input is not a matrix, or their rows or devices differ.

    Examples
    --------
    >>> import torch, selbp
    >>> residual, features = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), torch.tensor([[1.0], [2.0]])
    >>> selbp.ops.gradient_gram(residual, features)
    tensor([[4.0000, 3.0000],
            [3.0000, 2.5000]])
    """
    check_tensor("residual", residual)
    check_tensor("features", features)
    return _gradient_gram(residual, features, flag("bias", bias))


def check_factors(residual: Tensor, features: Tensor, *_: object) -> None:
    """Raise unless ``residual`` (n, C) and ``features`` (n, d) are floating matrices of one dtype and device."""
    check_floating("residual", residual)
    check_floating("features", features)
    check_shape("residual", residual, "(n, C)", (None, None))
    check_shape("features", features, f"(n, d) with n = {len(residual)} rows as residual", (len(residual), None))
    check_same_dtype("features", features, "residual", residual)
    check_same_device("features", features, "residual", residual)


def autocast_factors(a: Tensor, b: Tensor, *others: Any) -> tuple[Any, ...]:
    """Two tensors of different 16- and 32-bit types as float32: what an operator here accumulates in anyway."""
    if a.dtype != b.dtype and all(x.is_floating_point() and x.dtype != torch.float64 for x in (a, b)):
        a, b = a.float(), b.float()
    return a, b, *others


def finite_rows(residual: Tensor, features: Tensor) -> Tensor:
    """(n,) bool: rows in which both factors are finite."""
    return torch.isfinite(residual).all(1) & torch.isfinite(features).all(1)


def _cpu(residual: Tensor, features: Tensor, bias: bool) -> Tensor:
    dtype = accumulate_dtype(residual.dtype)
    r, h = residual.to(dtype).contiguous(), features.to(dtype).contiguous()
    n, classes, d = len(r), r.shape[1], h.shape[1]
    out = torch.empty(n, n, dtype=dtype)
    packed = torch.empty(-(-n // _BLOCK) * _BLOCK * (classes + d), dtype=dtype)
    finite = _native.gram(
        out.data_ptr(), packed.data_ptr(), r.data_ptr(), h.data_ptr(), dtype == torch.float64,
        n, classes, d, bias, native_threads(n * n),
    )  # fmt: skip
    if not finite:
        _zero_spoiled(out, r, h)
    return out


def _zero_spoiled(out: Tensor, residual: Tensor, features: Tensor) -> None:
    """Zero the rows and columns of samples that are not finite; called where the diagonal is not.

    A NaN or an infinity in r_i or h_i makes K_ii NaN or infinite, so looking at the inputs is not needed otherwise.
    Finite factors whose product overflows do so too: their infinities stay.
    """
    suspects = (~torch.isfinite(out.diagonal())).nonzero()[:, 0]
    if len(suspects):
        spoiled = suspects[~finite_rows(residual[suspects], features[suspects])]
        out[spoiled] = 0.0
        out[:, spoiled] = 0.0


def _fake(residual: Tensor, features: Tensor, bias: bool) -> Tensor:
    n = residual.shape[0]
    return residual.new_empty((n, n), dtype=accumulate_dtype(residual.dtype))


def _cuda(residual: Tensor, features: Tensor, bias: bool) -> Tensor:
    fused = _triton.kernels("cross_entropy", residual, features)
    if fused is not None:
        return fused.gradient_gram(residual, features, bias)
    dtype = accumulate_dtype(residual.dtype)
    return reference.gradient_gram(residual.to(dtype), features.to(dtype), bias=bias)


_gradient_gram = define(
    "gradient_gram(Tensor residual, Tensor features, bool bias) -> Tensor",
    check=check_factors, fake=_fake, cpu=_cpu, cuda=_cuda, autocast=autocast_factors,
)  # fmt: skip
