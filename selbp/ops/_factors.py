"""What the operators on per-sample gradients share: their factors, residual (n, C) and features (n, d)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import check_floating, check_same_device, check_same_dtype, check_shape
from selbp.ops._backends import native_threads


def check_factors(residual: Tensor, features: Tensor, *_: object) -> None:
    """Raise unless ``residual`` (n, C) and ``features`` (n, d) are floating matrices of one dtype and device."""
    check_floating("residual", residual)
    check_floating("features", features)
    check_shape("residual", residual, "(n, C)", (None, None))
    n = residual.shape[0]  # len() would tie a compiled graph to this one size
    check_shape("features", features, f"(n, d) with n = {n} rows as residual", (n, None))
    check_same_dtype("features", features, "residual", residual)
    check_same_device("features", features, "residual", residual)


def autocast_factors(a: Tensor, b: Tensor, *others: Any) -> tuple[Any, ...]:
    """Cast two factors of different 16- and 32-bit types to float32, in which the operators accumulate anyway."""
    if a.dtype != b.dtype and all(x.is_floating_point() and x.dtype != torch.float64 for x in (a, b)):
        a, b = a.float(), b.float()
    return a, b, *others


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``. Does not call ``to`` if it has that dtype: ``to`` takes a microsecond to see it."""
    return x if x.dtype == dtype else x.to(dtype)


def contiguous_in(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, contiguous; itself where it is."""
    return in_dtype(x, dtype).contiguous()


def finite_rows(residual: Tensor, features: Tensor) -> Tensor:
    """(n,) bool: rows in which both factors are finite."""
    return torch.isfinite(residual).all(1) & torch.isfinite(features).all(1)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """(rows,) float64 sums over the columns of ``a * b``, two contiguous CPU matrices, float32 or float64."""
    rows, columns = a.shape
    sums = torch.empty(rows, dtype=torch.float64, device="cpu")
    threads = native_threads(a.numel())
    _native.row_dots(sums.data_ptr(), a.data_ptr(), b.data_ptr(), a.dtype == torch.float64, rows, columns, threads)
    return sums
