"""From the factors of the per-sample gradients of a small minibatch to rows and weights, on the CPU in one native call.

For a small minibatch, separate calls take longer than the sums in them. If few rows are chosen, only their rows of the
Gram matrix are formed, so no Gram matrix is returned; :mod:`selbp.ops.match_gradients` returns one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import accumulate_dtype
from selbp.ops._factors import autocast_factors, contiguous_in
from selbp.ops._register import define
from selbp.ops.match_gradients import Search, check, composed, pack
from selbp.ops.matching import RULES
from selbp.ops.mean_gradient import is_small

_ROWS = 256  # above, the Gram matrix is worth the threads that it has by itself
_PACKED = 1 << 20  # numbers in the factors; in whole blocks of rows they stay in the cache


def in_one_call(residual: Tensor, features: Tensor, valid: Tensor, k: int) -> bool:
    """Whether one native call takes factors (n, C) and (n, d) of the rows ``valid`` (n,)."""
    if not (isinstance(residual, Tensor) and isinstance(features, Tensor) and residual.dim() == features.dim() == 2):
        return False
    (n, n_classes), width = residual.shape, features.shape[1]
    return (
        valid.device.type == "cpu"
        and 0 < n <= _ROWS
        and n == features.shape[0] == valid.shape[0]
        and 0 < k
        and is_small(n, n_classes, width)
        and (n_classes + width) * max(n, 64) <= _PACKED
        and residual.dtype != torch.bfloat16  # whose Gram matrix has a kernel of its own
    )


def match_small(
    residual: Tensor,  # (n, C)
    features: Tensor,  # (n, d)
    valid: Tensor,  # (n,) bool
    k: int,
    *,
    bias: bool,
    rule: str,
    ridge: float,
    nonnegative: bool,
) -> tuple[Tensor, Tensor]:
    """Rows (k,) int64 and weights (k,): :func:`match` of the factors' own Gram matrix and mean gradient.

    Spare slots have weight 0 and repeat the first chosen row, or the first valid one, or row 0.
    """
    indices, weights = _match_small(residual, features, valid, bias, k, rule, ridge, nonnegative)
    return indices, weights


def _fake(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> tuple[Tensor, Tensor]:
    dtype = accumulate_dtype(residual.dtype)
    return residual.new_empty(search.k, dtype=torch.int64), residual.new_empty(search.k, dtype=dtype)


def _composed(*problem: Any) -> tuple[Tensor, Tensor]:
    indices, weights, *_ = composed(*problem)
    return indices, weights


def _cpu(residual: Tensor, features: Tensor, valid: Tensor, bias: bool, search: Search) -> tuple[Tensor, Tensor]:
    k, rule, ridge, nonnegative, _ = search
    if in_one_call(residual, features, valid, k):
        (n, n_classes), width = residual.shape, features.shape[1]
        dtype = accumulate_dtype(residual.dtype)
        r, h, rows = contiguous_in(residual, dtype), contiguous_in(features, dtype), valid.contiguous()
        indices, weights = r.new_empty(k, dtype=torch.int64), r.new_empty(k)  # as score_minibatch allocates
        problem = (dtype == torch.float64, (n, n_classes, width), bias, k, RULES.index(rule), nonnegative, ridge)
        places = (rows.data_ptr(), indices.data_ptr(), weights.data_ptr())
        if _native.match_gradients(r.data_ptr(), h.data_ptr(), *problem, *places):
            return indices, weights
    # where a number is not finite, the long way finds the rows that it spoils
    return _composed(residual, features, valid, bias, search)


_match_small = define(
    "match_small(Tensor residual, Tensor features, Tensor valid, bool bias, SymInt k, str rule, float ridge, "
    "bool nonnegative) -> (Tensor indices, Tensor weights)",
    check=check,
    fake=_fake,
    cpu=_cpu,
    cuda=_composed,
    pack=pack,
    autocast=autocast_factors,
)
