"""``gradient_gram``: the inner products of all per-sample last-layer gradients, K = (R R^T) o (H H^T + 1).

On the CPU a native kernel computes the blocks of one triangle. It forms both products of a block, adds the bias's 1,
multiplies, and writes the block to its place and to its mirror image. So K is symmetric bit for bit. If the processor
multiplies pairs of bfloat16, bfloat16 factors are not widened first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import _native, reference
from selbp._checks import accumulate_dtype, check_flag, check_tensor
from selbp.ops import _backends
from selbp.ops._backends import native_threads
from selbp.ops._factors import autocast_factors, check_factors, contiguous_in, finite_rows
from selbp.ops._register import define

_BLOCK = 64  # rows per block of the native kernel, whose scratch holds whole blocks
_KEPT = 1 << 20  # numbers of that scratch that a thread keeps: fresh pages cost a tenth of the whole


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

    See Also
    --------
    selbp.ops.mean_gradient : the gradients' mean, from the same factors.
    selbp.ops.sketch_gram : estimates the products of sequences.
    selbp.ops.match : reads inner products only.

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
    return _gradient_gram(residual, features, check_flag("bias", bias))


def _cpu(residual: Tensor, features: Tensor, bias: bool) -> Tensor:
    dtype = accumulate_dtype(residual.dtype)
    n = len(residual)
    out = torch.empty(n, n, dtype=dtype, device="cpu")
    if residual.dtype == torch.bfloat16 and _native.multiplies_bfloat16():
        if not _of_pairs(out, _even(residual), _even(features), bias):
            _zero_spoiled(out, residual, features)
        return out
    r, h = contiguous_in(residual, dtype), contiguous_in(features, dtype)
    classes, d = r.shape[1], h.shape[1]
    count = -(-n // _BLOCK) * _BLOCK * (classes + d)
    packed = None if count <= _KEPT else torch.empty(count, dtype=dtype, device="cpu")
    finite = _native.gram(
        out.data_ptr(),
        0 if packed is None else packed.data_ptr(),
        r.data_ptr(),
        h.data_ptr(),
        dtype == torch.float64,
        n,
        classes,
        d,
        bias,
        native_threads(n * n),
    )
    if not finite:
        _zero_spoiled(out, r, h)
    return out


def _even(factor: Tensor) -> Tensor:
    """A bfloat16 factor with an even number of terms, contiguous and so in pairs."""
    return torch.nn.functional.pad(factor, (0, 1)) if factor.shape[1] % 2 else factor.contiguous()


def _of_pairs(out: Tensor, r: Tensor, h: Tensor, bias: bool) -> bool:
    """The kernel that multiplies bfloat16 pairs and sums in float32. Whether the diagonal is finite."""
    n, classes, d = len(r), r.shape[1] // 2, h.shape[1] // 2
    packed = torch.empty(-(-n // _BLOCK) * _BLOCK * (classes + d), dtype=torch.float32, device="cpu")
    return _native.gram_pairs(
        out.data_ptr(), packed.data_ptr(), r.data_ptr(), h.data_ptr(), n, classes, d, bias, native_threads(n * n)
    )


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
    fused = _backends.kernels(residual, features)
    if fused is not None:
        return fused.gradient_gram(residual, features, bias)
    dtype = accumulate_dtype(residual.dtype)
    return reference.gradient_gram(residual.to(dtype), features.to(dtype), bias=bias)


_gradient_gram = define(
    "gradient_gram(Tensor residual, Tensor features, bool bias) -> Tensor",
    check=check_factors,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    autocast=autocast_factors,
)
