"""The operators that training uses, from one place."""

from typing import Any

import torch
from torch import Tensor

from selbp import reference
from selbp.ops import BatchStatistics, gradient_gram
from selbp.reference import matching_residual, mean_gradient

__all__ = ["cross_entropy_statistics", "gradient_gram", "matching_residual", "mean_gradient", "residual"]


def _wide(x: Tensor) -> Tensor:
    """At least float32: the reference computes in the dtype it is given."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def cross_entropy_statistics(
    logits: Tensor, target: Tensor, features: Tensor | None, **options: Any
) -> BatchStatistics:
    """See :func:`selbp.reference.cross_entropy_statistics`."""
    features = None if features is None else features.to(_wide(logits).dtype)
    return reference.cross_entropy_statistics(_wide(logits), target, features, **options)


def residual(logits: Tensor, target: Tensor, lse: Tensor, **options: Any) -> Tensor:
    """See :func:`selbp.reference.residual`."""
    return reference.residual(_wide(logits), target, lse, **options)
