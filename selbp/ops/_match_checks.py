"""Checks of the arguments of ``match``, and of the least squares that use it."""

from __future__ import annotations

import torch
from torch import Tensor

from selbp._checks import check_choice, check_dtype, check_floating, check_range, check_same_device, check_same_dtype

RULES = ("ols", "normalized", "raw")  # in the order of csrc/matching/matching.hpp
_MOST = (1 << 31) - 1  # the solver counts in 32 bits


def check_match(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    k: int,
    rule: str,
    ridge: float,
    nonnegative: bool,
    valid: Tensor | None,
    tolerance: float,
) -> None:
    """Raise TypeError or ValueError, naming the argument, unless all of them fit."""
    check_problem(gram, inner, valid)
    check_floating("target_sq", target_sq)
    if target_sq.shape != gram.shape[:-2]:
        raise ValueError(f"target_sq must be (...) = {tuple(gram.shape[:-2])}, got {tuple(target_sq.shape)}")
    check_same_device("target_sq", target_sq, "gram", gram)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    if k > _MOST:
        raise ValueError(f"k must be at most {_MOST}, got {k}")
    check_choice("rule", rule, RULES)
    check_range("ridge", ridge, 0.0)
    check_range("tolerance", tolerance, 0.0)


def check_problem(gram: Tensor, inner: Tensor, valid: Tensor | None) -> None:
    """Raise TypeError or ValueError unless gram (..., n, n), inner (..., n) and valid (n,) or (..., n) fit."""
    check_floating("gram", gram)
    check_floating("inner", inner)
    if gram.dim() < 2 or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram must be (..., n, n), got {tuple(gram.shape)}")
    if inner.shape != gram.shape[:-1]:
        raise ValueError(f"inner must be (..., n) = {tuple(gram.shape[:-1])}, got {tuple(inner.shape)}")
    check_same_dtype("inner", inner, "gram", gram)
    check_same_device("inner", inner, "gram", gram)
    if valid is not None:
        check_dtype("valid", valid, torch.bool)
        if valid.shape != inner.shape and valid.shape != inner.shape[-1:]:
            raise ValueError(f"valid must be (n,) or (..., n) = {tuple(inner.shape)}, got {tuple(valid.shape)}")
        check_same_device("valid", valid, "gram", gram)
