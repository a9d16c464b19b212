"""``matching_residual``: how far a weighted selection is from the mean gradient, certified in float64.

A solver's own bookkeeping, or the quadratic form of a float32 Gram matrix, cannot certify a relative residual below
about 3e-4. This forms the difference M - sum_j w_j g_j itself, a block of classes at a time, from the factors.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from selbp import _native, reference
from selbp._checks import check_dtype, check_flag, check_floating, check_same_device, check_shape, check_tensor
from selbp.ops._factors import autocast_factors, check_factors, finite_rows, row_dots
from selbp.ops._register import define
from selbp.ops.mean_gradient import is_small

_BLOCK = 1 << 21  # float64 entries of one block of M (16 MiB)


class Chosen(Protocol):
    """A :class:`selbp.ops.Selection`, a :class:`selbp.ops.Matching` of one problem, or anything like them."""

    @property
    def indices(self) -> Tensor:
        """(k,) int64; -1 is an empty slot."""

    @property
    def weights(self) -> Tensor:
        """(k,) floating."""


def matching_residual(
    residual: Tensor,  # (n, C)
    features: Tensor,  # (n, d)
    selection: Chosen,
    *,
    bias: bool = True,
) -> Tensor:
    """Relative error of a selection, ``||M - sum_j w_j g_j|| / ||M||`` with M the mean of all n gradients.

    Parameters
    ----------
    residual : Tensor
        (n, C) gradient of each sample's loss with respect to the logits.
    features : Tensor
        (n, d) input of the head, in the dtype of ``residual``.
    selection : Selection or Matching
        Its ``indices`` (k,) and ``weights`` (k,); an index of -1 is an empty slot.
    bias : bool
        Whether the head has a bias.

    Returns
    -------
    Tensor
        () float64, computed in float64 whatever the inputs; NaN where M is zero. A row with a NaN or an infinity in
        either input counts as a zero gradient.

    Raises
    ------
    TypeError
        An input or a part of ``selection`` has the wrong type.
    ValueError
        A shape or a device does not fit; on the CPU also an index outside [-1, n).

    See Also
    --------
    selbp.ops.match : chooses the rows and weights.

    Examples
    --------
    >>> import torch, selbp
    >>> residual, features = torch.tensor([[1.0, -1.0], [0.5, -0.5]]), torch.tensor([[1.0], [2.0]])
    >>> everything = selbp.Selection(torch.tensor([0, 1]), torch.tensor([0.5, 0.5]))
    >>> selbp.ops.matching_residual(residual, features, everything)
    tensor(0., dtype=torch.float64)
    """
    check_tensor("residual", residual)
    check_tensor("features", features)
    for part in ("indices", "weights"):
        if not hasattr(selection, part):
            raise TypeError(f"selection must have .indices and .weights, got {type(selection).__name__}")
    indices, weights = selection.indices, selection.weights
    check_tensor("selection.indices", indices)
    check_tensor("selection.weights", weights)
    return _matching_residual(residual, features, indices, weights, check_flag("bias", bias))


def _check(residual: Tensor, features: Tensor, indices: Tensor, weights: Tensor, bias: bool) -> None:
    check_factors(residual, features)
    check_dtype("selection.indices", indices, torch.int64)
    check_shape("selection.indices", indices, "(k,)", (None,))
    check_floating("selection.weights", weights)
    k = indices.shape[0]
    check_shape("selection.weights", weights, f"(k,) with k = {k} as selection.indices", (k,))
    check_same_device("selection.indices", indices, "residual", residual)
    check_same_device("selection.weights", weights, "residual", residual)


def _cpu(residual: Tensor, features: Tensor, indices: Tensor, weights: Tensor, bias: bool) -> Tensor:
    n = len(residual)
    if len(indices) and not (-1 <= int(indices.min()) and int(indices.max()) < n):
        raise ValueError(f"selection.indices must lie in [-1, {n}), got values from {indices.min()} to {indices.max()}")
    h = features.double().contiguous()
    if is_small(n, residual.shape[1], h.shape[1]) and len(indices) <= n:
        r, w, rows = residual.double().contiguous(), weights.double().contiguous(), indices.contiguous()
        sizes = (n, r.shape[1], h.shape[1])
        squares = _native.matching_residual(
            r.data_ptr(), h.data_ptr(), sizes, bias, rows.data_ptr(), w.data_ptr(), len(w)
        )
        if all(map(math.isfinite, squares)) and squares[1]:
            return torch.tensor(math.sqrt(squares[0] / squares[1]), dtype=torch.float64, device="cpu")
    taken = indices >= 0
    rows, w = indices[taken], weights[taken].double()
    error_sq, mean_sq = _squares(residual, h, rows, w, bias)
    if not (math.isfinite(error_sq) and math.isfinite(mean_sq)):
        finite = finite_rows(residual, features)
        if not finite.all():
            zero = torch.zeros((), dtype=torch.float64, device="cpu")
            r = torch.where(finite[:, None], residual.double(), zero)
            error_sq, mean_sq = _squares(r, torch.where(finite[:, None], h, zero), rows, w, bias)
    return (error_sq / mean_sq).sqrt()


def _squares(residual: Tensor, h: Tensor, rows: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """Squared norms of M - sum_j w_j g_j and of M."""
    n, n_classes = residual.shape
    n = max(n, 1)
    weighted = h[rows] * w[:, None]
    block = max(1, min(n_classes, _BLOCK // max(n, h.shape[1], 1)))
    error_sq = torch.zeros((), dtype=torch.float64, device="cpu")
    mean_sq = torch.zeros((), dtype=torch.float64, device="cpu")
    for begin in range(0, n_classes, block):
        r = residual[:, begin : begin + block].double()
        mean = (r.t() @ h).div_(n)
        mean_sq += row_dots(mean, mean).sum()
        error = mean.addmm_(r[rows].t(), weighted, alpha=-1.0)
        error_sq += row_dots(error, error).sum()
        if bias:
            mean_bias = r.sum(0).div_(n)
            mean_sq += mean_bias.square().sum()
            error_sq += (mean_bias - w @ r[rows]).square().sum()
    return error_sq, mean_sq


def _fake(residual: Tensor, features: Tensor, indices: Tensor, weights: Tensor, bias: bool) -> Tensor:
    return residual.new_empty((), dtype=torch.float64)


_matching_residual = define(
    "matching_residual(Tensor residual, Tensor features, Tensor indices, Tensor weights, bool bias) -> Tensor",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=lambda residual, features, indices, weights, bias: reference.matching_residual(
        residual, features, indices, weights, bias=bias
    ),
    autocast=autocast_factors,
)
