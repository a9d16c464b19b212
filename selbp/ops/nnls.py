"""Nonnegative least squares: the matching of all n rows is the active-set method of Lawson & Hanson."""

from __future__ import annotations

from torch import Tensor

from selbp._checks import (
    accumulate_dtype,
    autocast_enabled,
    check_floating,
    check_optional_tensor,
    check_same_device,
    check_shape,
    check_tensor,
)
from selbp.ops._factors import autocast_factors
from selbp.ops._match_checks import check_problem
from selbp.ops.matching import match
from selbp.types import widest


def nnls(
    a: Tensor,  # (..., m, n)
    b: Tensor,  # (..., m)
    *,
    ridge: float = 0.0,
) -> Tensor:
    """Return the minimiser of ``||a x - b||^2 + ridge mean(diag a^T a) ||x||^2`` over x >= 0, batched, on the device.

    The normal equations are formed and solved in float64, so columns closer than 3e-6 (relative distance of one from
    the span of the others) count as dependent. A problem with an entry that is not finite gives NaN. Source: Lawson &
    Hanson (1974), chapter 23; what ``scipy.optimize.nnls`` computes.

    Parameters
    ----------
    a : Tensor
        (..., m, n) floating.
    b : Tensor
        (..., m) floating.
    ridge : float
        At least 0, relative to the mean squared norm of the columns.

    Returns
    -------
    Tensor
        (..., n), float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, for a wrong type, shape or range.

    See Also
    --------
    selbp.ops.nnls_gram : the same from inner products.
    selbp.ops.match : at most k terms.

    Examples
    --------
    >>> import torch, selbp
    >>> a = torch.eye(2).expand(3, 2, 2)  # three problems
    >>> selbp.ops.nnls(a, torch.tensor([[1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]]))
    tensor([[1., 2.],
            [1., 0.],
            [0., 0.]])
    """
    check_tensor("a", a)
    check_tensor("b", b)
    check_floating("a", a)
    check_floating("b", b)
    if a.dim() < 2:
        raise ValueError(f"a must be (..., m, n), got {tuple(a.shape)}")
    check_shape("b", b, f"(..., m) = {tuple(a.shape[:-1])}", a.shape[:-1])
    check_same_device("b", b, "a", a)
    matrix, target = a.double(), b.double()
    gram = matrix.mT @ matrix
    inner = (matrix.mT @ target[..., None])[..., 0]
    return _dense(gram, inner, target.square().sum(-1), ridge, None).to(accumulate_dtype(a.dtype))


def nnls_gram(
    gram: Tensor,  # (..., n, n)
    inner: Tensor,  # (..., n)
    *,
    ridge: float = 0.0,
    valid: Tensor | None = None,  # (n,) or (..., n) bool
) -> Tensor:
    """Return the minimiser of ``x^T gram x - 2 inner . x + ridge mean(diag gram) ||x||^2`` over x >= 0.

    :func:`nnls` if you have ``gram = a^T a`` and ``inner = a^T b`` already.

    Parameters
    ----------
    gram : Tensor
        (..., n, n) floating.
    inner : Tensor
        (..., n) floating.
    ridge : float
        At least 0, relative to the mean of the diagonal.
    valid : Tensor or None
        (n,) or (..., n) bool: rows that are not valid get x = 0. None: all are.

    Returns
    -------
    Tensor
        (..., n), float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, for a wrong type, shape or range.

    See Also
    --------
    selbp.ops.nnls : the same from the matrix and the right-hand side.

    Examples
    --------
    >>> import torch, selbp
    >>> selbp.ops.nnls_gram(torch.eye(2), torch.tensor([1.0, -2.0]))
    tensor([1., 0.])
    """
    check_tensor("gram", gram)
    check_tensor("inner", inner)
    check_optional_tensor("valid", valid)
    if autocast_enabled(gram):
        gram, inner = autocast_factors(gram, inner)
    check_problem(gram, inner, valid)
    # The square of a finite float16 or float32 may be infinite.
    wide = widest(gram.device)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).to(wide)
    explained = (inner.to(wide).square() / diagonal).masked_fill_(diagonal <= 0, 0.0)  # by each row alone
    if valid is not None:
        explained.masked_fill_(~valid, 0.0)
    # b^T b is not given; the most that one row explains of it sets the scale of what counts as noise.
    target_sq = explained.amax(-1) if inner.shape[-1] > 0 else explained.sum(-1)
    return _dense(gram, inner, target_sq, ridge, valid)


def _dense(gram: Tensor, inner: Tensor, target_sq: Tensor, ridge: float, valid: Tensor | None) -> Tensor:
    """The matching of all n rows as a dense vector; NaN where the problem is not finite."""
    n = inner.shape[-1]
    found = match(gram, inner, target_sq, n, ridge=ridge, valid=valid)
    slots = found.indices.remainder(n + 1)  # padding, -1, goes to a column that is cut off
    fill = found.residual.clamp(max=0.0)[..., None]  # 0, or NaN where the problem is not finite
    return fill.expand(*inner.shape[:-1], n + 1).scatter(-1, slots, found.weights)[..., :n].contiguous()
