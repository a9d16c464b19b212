"""The weights of chosen rows, and what each choice of weights estimates.

With v the number of valid rows (all n, unless some target is ignored or some loss is not finite) and m that of rows
really chosen (k, unless there are fewer):

    "mean"      v / (n m): 1 / k where every row is valid. The mean over the chosen rows, as every published rule that
                does not reweight trains; biased towards the rows that the rule prefers.
    "batch"     1 / n: the chosen rows keep the weight that they have in the whole minibatch; the step shrinks.
    "unbiased"  1 / (n pi), pi the row's inclusion probability: E[sum_j w_j g_j] = (1/n) sum_i g_i.
    "refit"     nonnegative least squares: the w >= 0 whose sum_j w_j g_j is nearest to the minibatch's mean gradient,
                with the ridge ``lam = ridge * mean(diag K)`` of the whole minibatch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selbp.ops.matching import nnls_gram
from selbp.ops.types import BatchStatistics
from selbp.selectors.proxies import GradientProxies

Weights = Literal["mean", "batch", "unbiased", "refit"]


def mean_weights(stats: BatchStatistics, real: Tensor) -> Tensor:
    """(k,) equal weights v / (n m), 0 for slots that are not ``real`` (k,).

    The target is the mean over n rows of which v have a gradient, so v / n is the share that m rows stand for. With
    every valid row chosen the weights are those of the whole minibatch, 1 / n.
    """
    dtype = stats.loss.dtype
    n = stats.valid.shape[0]
    return real * (stats.valid.sum().to(dtype) / (n * real.sum().clamp(min=1)))


def batch_weights(stats: BatchStatistics, real: Tensor) -> Tensor:
    """(k,) weights 1 / n, 0 for slots that are not ``real`` (k,)."""
    return real.to(stats.loss.dtype) / stats.valid.shape[0]


def unbiased_weights(stats: BatchStatistics, real: Tensor, expected: Tensor) -> Tensor:
    """(k,) weights 1 / (n E_j), E_j > 0 (k,) how often slot j's row is drawn in expectation."""
    n = stats.valid.shape[0]
    return torch.where(real, 1.0 / (n * torch.where(real, expected, 1.0)), 0.0).to(stats.loss.dtype)


def refit_weights(
    stats: BatchStatistics, indices: Tensor, real: Tensor, proxies: GradientProxies, ridge: float
) -> Tensor:
    """(k,) nonnegative least-squares weights on the rows ``indices`` (k,); 0 for slots that are not ``real``.

    All 0 where the gradients of the rows are so large that their products are not finite.
    """
    gram = proxies.gram()
    support = gram[indices][:, indices] + ridge_of(gram, stats.valid, ridge) * torch.eye(
        len(indices), device=gram.device
    )
    weights = nnls_gram(support.to(gram.dtype), proxies.mean_gradient().inner[indices].to(gram.dtype), valid=real)
    return torch.where(real & torch.isfinite(weights), weights, 0.0).to(stats.loss.dtype)


def ridge_of(gram: Tensor, valid: Tensor, ridge: float) -> Tensor:
    """() ``ridge * mean(diag gram)`` over the valid rows."""
    return ridge * torch.where(valid, gram.diagonal(), 0.0).sum() / valid.sum().clamp(min=1)


def equal_weights(
    weights: Weights,
    stats: BatchStatistics,
    indices: Tensor,
    real: Tensor,
    proxies: GradientProxies | None,
    ridge: float,
) -> Tensor:
    """(k,) weights of a rule that chooses without chance: ``"mean"``, ``"batch"`` or ``"refit"``."""
    if weights == "refit":
        if proxies is None:
            raise ValueError("weights='refit' reads the per-sample gradients: proxies must be given, got None")
        return refit_weights(stats, indices, real, proxies, ridge)
    return mean_weights(stats, real) if weights == "mean" else batch_weights(stats, real)
