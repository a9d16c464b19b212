"""Whole choices of k rows, as the selectors make them: by gradient norm, balanced, and diversified.

Nothing reads a value back to the host. Probabilities and products are float64, whatever the statistics are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selbp.reference.sampling import (
    choose_rows,
    cube_sample,
    fill_spare,
    inclusion_probabilities,
    percentile,
    slot_weights,
    top_rows,
)


def norm_odds(
    residual_sq: Tensor, feature_sq: Tensor | None, valid: Tensor, tau: Tensor, momentum: float, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """(n,) float64 odds by gradient norm, and () float64 the running mean of tau with this batch's.

    The odds are alike where no row has a gradient, and where the mean does not exceed ``threshold``.
    """
    score = (residual_sq if feature_sq is None else residual_sq * feature_sq).sqrt()
    eligible = valid & torch.isfinite(score)
    odds = torch.where(eligible, score.double(), 0.0)
    odds = torch.where(odds.any(), odds, eligible)
    share = odds / odds.sum().clamp(min=torch.finfo(odds.dtype).tiny)
    now = (eligible.sum() * (share @ share)).sqrt()  # |q - u|^2 = |q|^2 - 1 / v
    mean = torch.lerp(now, tau, momentum)
    return odds if threshold is None else torch.where(mean > threshold, odds, eligible), mean


def choose_by_norm(
    residual_sq: Tensor,
    feature_sq: Tensor | None,
    valid: Tensor,
    draws: Tensor,
    tau: Tensor,
    k: int,
    weights: str,
    momentum: float,
    threshold: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``selbp.ops.choose_by_norm`` chooses: indices (k,), weights (k,) float64 and the running mean of tau."""
    odds, mean = norm_odds(residual_sq, feature_sq, valid, tau, momentum, threshold)
    return *choose_rows(odds, valid, draws, k, "odds", weights), mean


def percentile_odds(
    loss: Tensor, valid: Tensor, history: Tensor, power: float, least: float,
    entered_and_below: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = percentile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(n,) float64 odds by the share of the last losses below each, and (length,) those last losses with these.

    0 for a row that is not valid or whose loss is not finite.
    """
    loss = torch.where(valid, loss.double(), torch.nan)
    entered, below = entered_and_below(history, loss)
    return torch.where(torch.isfinite(loss), below.pow(power).clamp(min=least), 0.0), entered


def choose_by_percentile(
    loss: Tensor, valid: Tensor, history: Tensor, draws: Tensor, k: int, weights: str, power: float, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``selbp.ops.choose_by_percentile`` draws: indices (k,), weights (k,) float64 and the last losses."""
    odds, entered = percentile_odds(loss, valid, history, power, least)
    return *choose_rows(odds, valid, draws, k, "odds", weights), entered


def choose_balanced(
    gram: Tensor,
    valid: Tensor,
    mixture: Tensor,
    draws: Tensor,
    k: int,
    by_norm: bool,
    cube: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = cube_sample,
) -> tuple[Tensor, Tensor]:
    """What ``selbp.ops.choose_balanced`` draws: indices (k,) and weights (k,) float64. ``cube`` walks."""
    gram, n = gram.double(), len(gram)
    eligible = valid & gram.diagonal().isfinite()
    odds = torch.where(eligible, gram.diagonal().clamp(min=0.0).sqrt(), 0.0)
    uniform = eligible.double()
    # Rows without a gradient are out: their share of the mean is 0. Where no row has one, all are drawn alike.
    probability = inclusion_probabilities(torch.where(odds.sum() > 0, odds, uniform) if by_norm else uniform, k)
    weights = torch.cat([uniform[:, None] / n, mixture], 1) * uniform[:, None]
    sketch = torch.where(uniform[:, None] > 0, gram.nan_to_num(0.0, 0.0, 0.0) @ weights, 0.0)
    chosen = cube(sketch, probability, draws[0].argsort(), draws[1])
    indices, real = top_rows(torch.zeros_like(odds), chosen, k)
    return indices, slot_weights("unbiased", valid, real, probability[indices])


def choose_diverse(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, draws: Tensor, k: int, weights: str
) -> tuple[Tensor, Tensor]:
    """What ``selbp.ops.choose_diverse`` draws: indices (k,) and weights (k,) float64."""
    n, noise = len(gram), rounding_noise(gram.dtype)
    gram, inner = gram.double(), inner.double()
    distance = gram.diagonal().clone()  # |g_j|^2 outside the span of the rows drawn
    spent = noise * (distance.clamp(min=0.0) * target_sq.double()).sqrt()
    dependent = noise * distance
    free = valid.clone()
    columns = gram.new_zeros(k, n)  # of the Cholesky factor, one a draw
    picks: list[Tensor] = []
    gumbel = -torch.log(-torch.log(draws.clamp(min=1e-300)))
    for step in range(k):
        magnitude = inner.abs()
        # arg max of log odds + Gumbel noise is a draw with those odds; log odds of -1e3 lose to any others.
        odds = torch.where(magnitude > spent, magnitude, 0.0)
        key = torch.where(odds > 0, odds.clamp(min=1e-300).log(), -1e3) + gumbel[step]
        pick = torch.where(free, key, -torch.inf).argmax(0, keepdim=True)
        picks.append(pick)
        free = free.scatter(0, pick, False)
        pivot_sq = distance.gather(0, pick)
        scale = torch.where(pivot_sq > dependent.gather(0, pick), pivot_sq.clamp(min=1e-300).rsqrt(), 0.0)
        column = (gram.index_select(0, pick)[0] - columns[:, pick][:, 0] @ columns) * scale
        columns[step] = column
        inner = inner - (inner.gather(0, pick) * scale) * column
        distance = distance - column.square()
    real = torch.arange(k, device=gram.device) < valid.sum()
    indices, real = fill_spare(torch.cat(picks), real, valid)
    return indices, slot_weights(weights, valid, real)


def rounding_noise(dtype: torch.dtype) -> float:
    """What rounding leaves of products e . g and |g|^2 of gradients whose Gram matrix has this type, relative."""
    return 1e-12 if dtype == torch.float64 else 1e-6
