"""From the factors of the per-sample gradients to rows and weights: Gram matrix, mean gradient and match in one call.

Three operators and what fills the spare slots, in turn; of a small minibatch on the CPU one native call, for there the
calls themselves take longer than the sums. Where few rows are chosen it forms only the Gram matrix's rows of these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import (
    accumulate_dtype,
    check_choice,
    check_dtype,
    check_range,
    check_same_device,
    check_shape,
)
from selbp.ops._factors import autocast_factors, check_factors
from selbp.ops._register import define
from selbp.ops.gram import gradient_gram
from selbp.ops.matching import RULES, match
from selbp.ops.mean_gradient import is_small, mean_gradient
from selbp.reference.sampling import fill_spare

_ROWS = 256  # above, the Gram matrix is worth the threads that it has by itself
_PACKED = 1 << 20  # numbers in the factors; in whole blocks of rows they stay in the cache


def in_one_call(residual: Tensor, features: Tensor, valid: Tensor, k: int) -> bool:
    """Whether one native call takes factors (n, C) and (n, d) of the rows ``valid`` (n,), and keeps no Gram matrix."""
    if not (isinstance(residual, Tensor) and isinstance(features, Tensor) and residual.dim() == features.dim() == 2):
        return False
    (n, n_classes), width = residual.shape, features.shape[1]
    return (
        0 < n <= _ROWS
        and n == features.shape[0] == valid.shape[0]
        and 0 < k
        and is_small(n, n_classes, width)
        and (n_classes + width) * max(n, 64) <= _PACKED
        and residual.dtype != torch.bfloat16  # whose Gram matrix has a kernel of its own
    )


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
) -> tuple[Tensor, Tensor]:
    """Rows (k,) int64 and weights (k,): :func:`match` of the factors' own Gram matrix and mean gradient.

    Spare slots have weight 0 and repeat the first chosen row, or the first valid one, or row 0.
    """
    indices, weights = _match_gradients(residual, features, valid, bias, k, rule, ridge, nonnegative)
    return indices, weights


def _check(
    residual: Tensor, features: Tensor, valid: Tensor, bias: bool, k: int, rule: str, ridge: float, nonnegative: bool
) -> None:
    check_factors(residual, features)
    check_dtype("valid", valid, torch.bool)
    check_shape("valid", valid, f"(n,) with n = {len(residual)} rows as residual", (len(residual),))
    check_same_device("valid", valid, "residual", residual)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    check_choice("rule", rule, RULES)
    check_range("ridge", ridge, 0.0)


def _fake(
    residual: Tensor, features: Tensor, valid: Tensor, bias: bool, k: int, rule: str, ridge: float, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    return residual.new_empty(k, dtype=torch.int64), residual.new_empty(k, dtype=accumulate_dtype(residual.dtype))


def _composed(
    residual: Tensor, features: Tensor, valid: Tensor, bias: bool, k: int, rule: str, ridge: float, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    gram, mean = gradient_gram(residual, features, bias=bias), mean_gradient(residual, features, bias=bias)
    found = match(gram, mean.inner, mean.target_sq, k, rule=rule, ridge=ridge, nonnegative=nonnegative, valid=valid)
    indices, _ = fill_spare(found.indices, found.indices >= 0, valid)
    return indices, found.weights


def _cpu(
    residual: Tensor, features: Tensor, valid: Tensor, bias: bool, k: int, rule: str, ridge: float, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    if in_one_call(residual, features, valid, k):
        (n, n_classes), width = residual.shape, features.shape[1]
        dtype = accumulate_dtype(residual.dtype)
        r, h, rows = residual.to(dtype).contiguous(), features.to(dtype).contiguous(), valid.contiguous()
        indices, weights = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=dtype)
        problem = (dtype == torch.float64, (n, n_classes, width), bias, k, RULES.index(rule), nonnegative, ridge)
        places = (rows.data_ptr(), indices.data_ptr(), weights.data_ptr())
        if _native.match_gradients(r.data_ptr(), h.data_ptr(), *problem, *places):
            return indices, weights
    # where a number is not finite, the long way finds the rows that it spoils
    return _composed(residual, features, valid, bias, k, rule, ridge, nonnegative)


_match_gradients = define(
    "match_gradients(Tensor residual, Tensor features, Tensor valid, bool bias, SymInt k, str rule, float ridge, "
    "bool nonnegative) -> (Tensor indices, Tensor weights)",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=_composed,
    autocast=autocast_factors,
)
