"""``mean_gradient``: the exact mean gradient of the head, and every sample's inner product with it, without K.

Two GEMMs: M = (1/n) R^T [H, 1], then b_i = r_i^T M [h_i, 1]; one native kernel where the cache holds the factors.
Taking b from the Gram matrix instead, as K 1 / n, would lose everything where the mean nearly cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selbp import _native, reference
from selbp._checks import accumulate_dtype, check_flag, check_tensor
from selbp.ops import _backends, _gemm
from selbp.ops._backends import native_threads
from selbp.ops._factors import autocast_factors, check_factors, contiguous_in, finite_rows, row_dots
from selbp.ops._register import define
from selbp.types import MeanGradient

_SMALL = 1 << 20  # n C d up to which one native call beats two BLAS calls and what stands around them
_CACHED = 1 << 20  # bytes of the features, and of M, up to which it still beats them: both stay in the cache
_GRAIN = 1 << 20  # n C d that is worth waking a thread for: about 50 us


def is_small(n: int, n_classes: int, width: int) -> bool:
    """Whether a minibatch's factors go to the kernels for small ones."""
    return 0 < n * n_classes * width <= _SMALL


def mean_gradient(
    residual: Tensor,  # (n, C)
    features: Tensor,  # (n, d)
    *,
    bias: bool = True,
) -> MeanGradient:
    """The mean last-layer gradient M of a minibatch and each sample's inner product with it.

    M is what an ordinary backward pass would leave in the head's ``.grad`` for a mean loss.

    Parameters
    ----------
    residual : Tensor
        (n, C) gradient of each sample's loss with respect to the logits.
    features : Tensor
        (n, d) input of the head, in the dtype of ``residual``.
    bias : bool
        Whether the head has a bias.

    Returns
    -------
    MeanGradient
        float64 for float64 inputs, else float32. ``inner`` and ``target_sq`` are summed in float64. A row with a NaN or
        an infinity in either input counts as a zero gradient.

    Raises
    ------
    TypeError
        An input is not a floating tensor, or their dtypes differ.
    ValueError
        An input is not a matrix, or their rows or devices differ.

    See Also
    --------
    selbp.ops.gradient_gram : the gradients' inner products with each other.
    selbp.ops.residual : the first factor.

    Examples
    --------
    >>> import torch, selbp
    >>> residual, features = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), torch.tensor([[1.0], [2.0]])
    >>> mean = selbp.ops.mean_gradient(residual, features)
    >>> mean.inner, mean.head_bias
    (tensor([3.5000, 2.7500]), tensor([ 0.7500, -0.7500]))
    """
    check_tensor("residual", residual)
    check_tensor("features", features)
    inner, target_sq, head_weight, head_bias = _mean_gradient(residual, features, check_flag("bias", bias))
    return MeanGradient(inner, target_sq, head_weight, head_bias if bias else None)


def _cpu(residual: Tensor, features: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(residual.dtype)
    r, h = contiguous_in(residual, dtype), contiguous_in(features, dtype)
    products = (_in_one_call if _stays_cached(r, h) else _products)(r, h, len(r), bias)
    if r.shape[1] and math.isfinite(products[1]):
        return products
    # Only now are the rows looked at: a NaN or an infinity in either factor makes some entry of M, and so its norm,
    # a NaN or an infinity; an M of no entries shows nothing.
    finite = finite_rows(r, h)
    if finite.all():
        return products
    kept, target_sq, head_weight, head_bias = _products(r[finite], h[finite], len(r), bias)
    inner = torch.zeros(len(r), dtype=dtype, device="cpu")
    inner[finite] = kept
    return inner, target_sq, head_weight, head_bias


def _stays_cached(r: Tensor, h: Tensor) -> bool:
    """Whether a minibatch's contiguous factors go to the native kernel: small ones, and those that the cache holds."""
    (n, n_classes), width = r.shape, h.shape[1]
    cached = max(n, n_classes) * width * r.element_size() <= _CACHED and n * n_classes * width > 0
    return cached or is_small(n, n_classes, width)


def _in_one_call(r: Tensor, h: Tensor, n: int, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four results in one native call."""
    dtype, n_classes, width = r.dtype, r.shape[1], h.shape[1]
    inner, target_sq = r.new_empty(n), r.new_empty(())
    head_weight, head_bias = r.new_empty(n_classes, width), r.new_empty(n_classes * bias)
    out = (inner.data_ptr(), target_sq.data_ptr(), head_weight.data_ptr(), head_bias.data_ptr())
    shape, threads = (n, n_classes, width), native_threads(n * n_classes * width, _GRAIN)
    _native.mean_gradient(r.data_ptr(), h.data_ptr(), dtype == torch.float64, shape, bias, out, threads)
    return inner, target_sq, head_weight, head_bias


def _products(r: Tensor, h: Tensor, n: int, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four results over the rows given, of a minibatch of ``n``."""
    n = max(n, 1)
    head_weight = _gemm.linear(r.t(), h.t()).div_(n)
    inner = row_dots(_gemm.linear(r, head_weight.t()), h)
    target_sq = row_dots(head_weight, head_weight).sum()
    head_bias = r.new_empty(0)
    if bias:
        head_bias = r.sum(0).div_(n)
        inner += torch.mv(r, head_bias)
        target_sq += head_bias.double().square().sum()
    return inner.to(r.dtype), target_sq.to(r.dtype), head_weight, head_bias


def _fake(residual: Tensor, features: Tensor, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, n_classes), d = residual.shape, features.shape[1]
    dtype = accumulate_dtype(residual.dtype)
    shapes = ((n,), (), (n_classes, d), (n_classes if bias else 0,))
    inner, target_sq, head_weight, head_bias = (residual.new_empty(shape, dtype=dtype) for shape in shapes)
    return inner, target_sq, head_weight, head_bias


def on_cuda(
    residual: Tensor, features: Tensor, bias: bool, finite: Tensor | bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the operator; ``finite``: the rows' flags, (n,) uint8, or whether every row is known to be finite."""
    fused = _backends.kernels(residual, features)
    made: tuple[Tensor, Tensor, Tensor, Tensor] | None = (
        None if fused is None else fused.mean_gradient(residual, features, bias, finite)
    )
    if made is not None:
        return made
    dtype = accumulate_dtype(residual.dtype)
    inner, target_sq, head_weight, head_bias = reference.mean_gradient(
        residual.to(dtype), features.to(dtype), bias=bias
    )
    return inner, target_sq, head_weight, inner.new_empty(0) if head_bias is None else head_bias


_mean_gradient = define(
    "mean_gradient(Tensor residual, Tensor features, bool bias)"
    " -> (Tensor inner, Tensor target_sq, Tensor head_weight, Tensor head_bias)",
    check=check_factors,
    fake=_fake,
    cpu=_cpu,
    cuda=on_cuda,
    autocast=autocast_factors,
)
