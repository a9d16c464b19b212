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

from selbp.ops.nnls import nnls_gram
from selbp.selectors.proxies import GradientProxies
from selbp.types import BatchStatistics

Weights = Literal["mean", "batch", "unbiased", "refit"]


def refit_weights(
    stats: BatchStatistics, indices: Tensor, real: Tensor, proxies: GradientProxies, ridge: float
) -> Tensor:
    """(k,) nonnegative least-squares weights on the rows ``indices`` (k,); 0 for slots that are not ``real``.

    All 0 where the gradients of the rows are so large that their products are not finite.
    """
    gram = proxies.gram()
    support = gram[indices][:, indices] + ridge_of(gram, stats.valid, ridge) * torch.eye(
        len(indices), dtype=gram.dtype, device=gram.device
    )
    weights = nnls_gram(support.to(gram.dtype), proxies.mean_gradient().inner[indices].to(gram.dtype), valid=real)
    return torch.where(real & torch.isfinite(weights), weights, 0.0).to(stats.loss.dtype)


def ridge_of(gram: Tensor, valid: Tensor, ridge: float) -> Tensor:
    """() ``ridge * mean(diag gram)`` over the valid rows."""
    return ridge * torch.where(valid, gram.diagonal(), 0.0).sum() / valid.sum().clamp(min=1)
