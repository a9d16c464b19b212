"""Rules of this package's own differentiable operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selbp import ops  # noqa: F401  registers them
from selbp.rows.gradient import RowGradient
from selbp.rows.registry import require, rule
from selbp.rows.wrap import wrap


@rule("selbp::linear_cross_entropy_backward")
def linear_cross_entropy(
    func: Any, gradient: Any, features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> Any:
    """The samples are dim 0, and the call names no rows of its own."""
    target, lse, p_rest, valid, logits, left_out, class_weight, rows, *options = others
    require(type(gradient) is RowGradient and gradient._layout.dim == 0, "the losses' gradient is dense")
    require(rows is None, "the call names rows of its own")
    layout = gradient._layout
    taken = [layout.take(x, 0) for x in (target, lse, p_rest, valid)]
    kept = [layout.take(x, 0) if x.numel() else x for x in (logits, left_out)]
    hidden, *parameters = func(
        gradient._data, layout.take(features, 0), weight, bias, *taken, *kept, class_weight, None, *options
    )
    needs_features = options[-3]
    return (wrap(hidden, layout) if needs_features else hidden, *parameters)
