"""Per-sample last-layer gradients by their factors: Gram matrix, mean, and how well a selection matches the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from selbp.types import MeanGradient


def _finite_rows(residual: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Both with every row zeroed that has a non-finite entry in either: it counts as a zero gradient."""
    finite = (torch.isfinite(residual).all(1) & torch.isfinite(features).all(1))[:, None]
    return torch.where(finite, residual, 0.0), torch.where(finite, features, 0.0)


def gradient_gram(residual: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    """(n, n) inner products of the per-sample last-layer gradients, ``(R R^T) * (H H^T + 1)``."""
    residual, features = _finite_rows(residual, features)
    return (residual @ residual.T) * (features @ features.T + float(bias))


def mean_gradient(residual: Tensor, features: Tensor, *, bias: bool = True) -> MeanGradient:
    """The mean gradient M = (1/n) R^T [H, 1] and b_i = r_i^T M [h_i, 1], without the Gram matrix.

    ``1^T K 1 / n^2`` would lose everything where the mean nearly cancels; the factors do not.
    """
    residual, features = _finite_rows(residual, features)
    n = max(len(residual), 1)
    head_weight = residual.T @ features / n
    head_bias = residual.sum(0) / n if bias else None
    inner = ((residual @ head_weight) * features).sum(1)
    target_sq = head_weight.double().square().sum()
    if head_bias is not None:
        inner = inner + residual @ head_bias
        target_sq = target_sq + head_bias.double().square().sum()
    return MeanGradient(inner, target_sq.to(residual.dtype), head_weight, head_bias)


def matching_residual(
    residual: Tensor, features: Tensor, indices: Tensor, weights: Tensor, *, bias: bool = True
) -> Tensor:
    """() ``||M - sum_j w_j g_j|| / ||M||`` in float64 from the factors; index -1 counts as weight 0."""
    residual, features = _finite_rows(residual.double(), features.double())
    if bias:
        features = torch.cat([features, features.new_ones(len(features), 1)], 1)
    if not len(residual):
        return residual.new_full((), torch.nan)
    w = torch.where(indices >= 0, weights, 0.0).double()
    rows = indices.clamp(min=0)
    mean = residual.T @ features / max(len(residual), 1)
    chosen = residual[rows] * w[:, None]
    return (mean - chosen.T @ features[rows]).norm() / mean.norm()
