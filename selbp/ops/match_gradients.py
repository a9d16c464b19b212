"""From the factors of the per-sample gradients to rows and weights: Gram matrix, mean gradient and match in one call.

On a GPU the three share what they would each launch. For a small minibatch on a CPU see :mod:`selbp.ops.match_small`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selbp._checks import (
    accumulate_dtype,
    check_choice,
    check_dtype,
    check_range,
    check_same_device,
    check_shape,
)
from selbp.ops import _backends
from selbp.ops._factors import autocast_factors, check_factors
from selbp.ops._register import define
from selbp.ops.gram import _cpu as gram_on_cpu
from selbp.ops.gram import gradient_gram
from selbp.ops.matching import RULES, match, match_filled
from selbp.ops.matching import _cpu as match_on_cpu
from selbp.ops.mean_gradient import _cpu as mean_on_cpu
from selbp.ops.mean_gradient import mean_gradient, on_cuda
from selbp.reference.sampling import fill_spare
from selbp.types import MeanGradient

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Search(NamedTuple):
    """What is searched for, and how: as in :func:`selbp.ops.match`."""

    k: int
    rule: str
    ridge: float
    nonnegative: bool
    finite: bool = False  # no factor holds a NaN or an infinity


class MatchedGradients(NamedTuple):
    """The rows and weights that match the mean gradient, and what they were found from."""

    indices: Tensor  # (k,) int64; spare slots repeat the first chosen row, or the first valid one, or row 0
    weights: Tensor  # (k,); 0 in spare slots
    gram: Tensor  # (n, n)
    mean: MeanGradient


def match_gradients(
    residual: Tensor,  # (n, C)
    features: Tensor,  # (n, d)
    valid: Tensor,  # (n,) bool
    k: int,
    *,
    bias: bool,
    rule: str,
    ridge: float,
    nonnegative: bool,
    finite: bool = False,
) -> MatchedGradients:
    """:func:`gradient_gram`, :func:`mean_gradient` and :func:`match` of the same factors, each as it is by itself.

    ``finite`` says that no factor holds a NaN or an infinity: a GPU does not look for them then.
    """
    found = _match_gradients(residual, features, valid, bias, k, rule, ridge, nonnegative, finite)
    indices, weights, gram, inner, target_sq, head_weight, head_bias = found
    return MatchedGradients(
        indices, weights, gram, MeanGradient(inner, target_sq, head_weight, head_bias if bias else None)
    )


def pack(
    residual: Tensor, features: Tensor, valid: Tensor, bias: bool, *search: Any
) -> tuple[Tensor, Tensor, Tensor, bool, Search]:
    """The schema's arguments with those of the search in one."""
    return residual, features, valid, bias, Search(*search)


def check(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> None:
    """Raise ValueError or TypeError for arguments that do not fit."""
    check_factors(residual, features)
    check_dtype("valid", valid, torch.bool)
    n = residual.shape[0]
    check_shape("valid", valid, f"(n,) with n = {n} rows as residual", (n,))
    check_same_device("valid", valid, "residual", residual)
    if search.k < 0:
        raise ValueError(f"k must be at least 0, got {search.k}")
    check_choice("rule", search.rule, RULES)
    check_range("ridge", search.ridge, 0.0)


def _fake(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> _Outputs:
    (n, n_classes), width = residual.shape, features.shape[1]
    dtype = accumulate_dtype(residual.dtype)
    shapes = ((search.k,), (n, n), (n,), (), (n_classes, width), (n_classes if bias else 0,))
    weights, gram, inner, target_sq, head_weight, head_bias = (residual.new_empty(s, dtype=dtype) for s in shapes)
    return residual.new_empty(search.k, dtype=torch.int64), weights, gram, inner, target_sq, head_weight, head_bias


def composed(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> _Outputs:
    """The three operators, one after the other."""
    k, rule, ridge, nonnegative, _ = search
    gram, mean = gradient_gram(residual, features, bias=bias), mean_gradient(residual, features, bias=bias)
    found = match(gram, mean.inner, mean.target_sq, k, rule=rule, ridge=ridge, nonnegative=nonnegative, valid=valid)
    indices, _ = fill_spare(found.indices, found.indices >= 0, valid)
    head_bias = mean.inner.new_empty(0) if mean.head_bias is None else mean.head_bias
    return indices, found.weights, gram, mean.inner, mean.target_sq, mean.head_weight, head_bias


def _cpu(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> _Outputs:
    """The three's backends themselves: after a product the call of an operator takes 100 us, its code out of cache."""
    k, rule, ridge, nonnegative, _ = search
    if not len(residual):
        return composed(residual, features, valid, bias, search)
    gram = gram_on_cpu(residual, features, bias)
    mean = inner, target_sq, _, _ = mean_on_cpu(residual, features, bias)
    found = match_on_cpu(gram, inner, target_sq, k, rule, ridge, nonnegative, valid, 0.0, fill=True)
    return found[0], found[1], gram, *mean


def _cuda(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> _Outputs:
    k, rule, ridge, nonnegative, finite = search
    fused = _backends.kernels(residual, features)
    if fused is None or not len(residual) or not k:
        return composed(residual, features, valid, bias, search)
    known = finite or fused.finite_flags(residual, features)
    gram: Tensor = fused.gradient_gram(residual, features, bias, known)
    inner, target_sq, head_weight, head_bias = on_cuda(residual, features, bias, known)
    indices, weights = match_filled(gram, inner, target_sq, valid, k, rule, ridge, nonnegative)
    return indices, weights, gram, inner, target_sq, head_weight, head_bias


_match_gradients = define(
    "match_gradients(Tensor residual, Tensor features, Tensor valid, bool bias, SymInt k, str rule, float ridge, "
    "bool nonnegative, bool finite=False) -> (Tensor indices, Tensor weights, Tensor gram, Tensor inner, "
    "Tensor target_sq, Tensor head_weight, Tensor head_bias)",
    check=check,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    pack=pack,
    autocast=autocast_factors,
)
