"""Greedy matching of the mean gradient, and nonnegative least squares."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from selbp.types import Matching, MatchStatus

# What the rounding of the inputs cannot tell from 0, by their dtype (float64, any other). The arithmetic is float64.
RANK_TOLERANCE = (1e-11, 1e-5)  # row j lies in the span of the support where D_j <= this * G_jj
NOISE_TOLERANCE = (1e-12, 1e-6)  # a correlation is 0 where |c_j| <= this * sqrt(K_jj) * ||mean||
TIE_TOLERANCE = 1e-12  # scores this close are equal, and the lowest index wins


def match(
    gram: Tensor,  # (..., n, n) K
    inner: Tensor,  # (..., n) b
    target_sq: Tensor,  # (...) ||mean||^2
    k: int,
    *,
    rule: str = "ols",
    ridge: float = 1e-3,
    nonnegative: bool = True,
    valid: Tensor | None = None,  # (..., n) bool
    tolerance: float = 0.0,
) -> Matching:
    """At most k rows S and weights w that make ``||mean - sum_S w_j g_j||^2 + lam ||w||^2`` small, greedily.

    Rows are added one at a time, each time the one of greatest score, and all weights are refitted exactly:
    ``(K + lam I)_SS w = b_S`` with ``lam = ridge * mean(diag K)`` over the valid rows. With c = b - K_:S w the
    correlations and D_j the squared distance of row j from the span of S (both with the ridge), the score is

        "ols"         c_j^2 / D_j       the exact decrease of the objective (orthogonal least squares)
        "normalized"  |c_j| / sqrt(G_jj), G = K + lam I     orthogonal matching pursuit
        "raw"         |c_j|             GradMatch (Killamsetty et al. 2021), whose rows are not normalised

    With ``nonnegative``, only rows with c_j > 0 are eligible, and a weight that the refit turns negative leaves S by
    the step of Lawson & Hanson (1974, chapter 23): with k = n the result is the nonnegative least-squares solution.
    The relative residual that is reported leaves the ridge out.
    """
    batch, n = inner.shape[:-1], inner.shape[-1]
    rows = torch.ones_like(inner, dtype=torch.bool) if valid is None else valid.expand(inner.shape)
    size = math.prod(batch)
    problems = zip(
        gram.double().reshape(size, n, n),
        inner.double().reshape(size, n),
        target_sq.double().reshape(size),
        rows.reshape(size, n),
        strict=True,
    )
    exact = gram.dtype == torch.float64
    options = _Options(k, rule, ridge, nonnegative, tolerance, exact)
    found = [_match_one(*problem, options) for problem in problems]
    result = Matching(
        indices=inner.new_full((len(found), k), -1, dtype=torch.int64),
        weights=inner.new_zeros(len(found), k, dtype=torch.float64),
        count=inner.new_tensor([len(support) for support, *_ in found], dtype=torch.int32),
        residual=inner.new_tensor([residual for *_, residual, _ in found], dtype=torch.float64),
        status=inner.new_tensor([status for *_, status in found], dtype=torch.uint8),
    )
    for row, (support, weights, *_) in enumerate(found):
        result.indices[row, : len(support)] = torch.tensor(support, dtype=torch.int64, device=result.indices.device)
        result.weights[row, : len(support)] = weights
    output = torch.float64 if exact else torch.float32
    return Matching(
        indices=result.indices.reshape(*batch, k),
        weights=result.weights.reshape(*batch, k).to(output),
        count=result.count.reshape(batch),
        residual=result.residual.reshape(batch).to(output),
        status=result.status.reshape(batch),
    )


class _Options(NamedTuple):
    k: int
    rule: str
    ridge: float
    nonnegative: bool
    tolerance: float
    exact: bool  # float64 came, whose tolerances are narrower


def _match_one(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    valid: Tensor,
    options: _Options,
) -> tuple[list[int], Tensor, float, MatchStatus]:
    """One problem in float64: support in order of choice, weights, relative residual, status."""
    pair = valid[:, None] & valid[None, :]
    gram, inner = torch.where(pair, gram, 0.0), torch.where(valid, inner, 0.0)
    if not (torch.isfinite(gram).all() and torch.isfinite(inner).all() and 0.0 <= target_sq < torch.inf):
        return [], inner[:0], float("nan"), MatchStatus.INVALID
    row_scale, mean_scale = _power_of_two(gram.diagonal().amax() if len(gram) else target_sq), _power_of_two(target_sq)
    gram, inner = gram * row_scale * row_scale, inner * row_scale * mean_scale
    target_sq = target_sq * mean_scale * mean_scale

    support, weights, status = _pursue(gram, inner, target_sq, valid, options)
    explained = 2.0 * weights @ inner[support] - weights @ gram[support][:, support] @ weights
    residual_sq = (target_sq - explained).clamp(min=0.0) / target_sq if target_sq > 0 else target_sq
    return support, weights * (row_scale / mean_scale), float(residual_sq.sqrt()), status


def _power_of_two(square: Tensor) -> Tensor:
    """A power of two s with s^2 * ``square`` in [1, 4), or 1 where ``square`` is 0. Scaling by it is exact."""
    exponent = torch.frexp(square).exponent - 1  # square in [2^e, 2^(e + 1))
    return torch.ldexp(torch.ones_like(square), -exponent.div(2, rounding_mode="floor")) if square > 0 else square + 1.0


def _pursue(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    valid: Tensor,
    options: _Options,
) -> tuple[list[int], Tensor, MatchStatus]:
    """The greedy loop on a scaled problem whose invalid rows are zero."""
    k, rule, ridge, nonnegative, tolerance, exact = options
    diagonal = gram.diagonal()
    lam = ridge * diagonal.sum() / valid.sum().clamp(min=1)
    ridged = gram + lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    noise = NOISE_TOLERANCE[not exact] * (diagonal * target_sq).sqrt()
    support: list[int] = []
    weights = inner[:0]
    basis = gram[:0]  # see _append
    rejected: list[int] = []  # rows that the refit on this support turned down: their gain is a rounding error
    for _ in range(3 * k + 16):
        correlation = inner - gram[:, support] @ weights  # of rows outside S: the ridge adds nothing there
        distance = ridged.diagonal() - basis.square().sum(0)
        eligible = valid & (distance > RANK_TOLERANCE[not exact] * ridged.diagonal())
        eligible &= (correlation if nonnegative else correlation.abs()) > noise
        eligible[support + rejected] = False
        if len(support) == k:
            return support, weights, MatchStatus.FULL
        if tolerance and target_sq - weights @ inner[support] <= tolerance**2 * target_sq:  # the ridge's term counts
            return support, weights, MatchStatus.TOLERANCE
        if not eligible.any():
            return support, weights, MatchStatus.OPTIMAL
        if rule == "ols":
            score = correlation.square() / distance
        elif rule == "normalized":
            score = correlation.abs() / ridged.diagonal().sqrt()
        else:
            score = correlation.abs()
        score = torch.where(eligible, score, -torch.inf)
        best = int((score >= score.max() * (1.0 - TIE_TOLERANCE)).nonzero()[0])
        start = torch.cat([weights, weights.new_zeros(1)])
        support, weights, basis = _refit(
            ridged, inner, [*support, best], start, _append(ridged, basis, best), nonnegative
        )
        rejected = [] if best in support else [*rejected, best]
    return support, weights, MatchStatus.FULL if len(support) == k else MatchStatus.ITERATIONS


def _append(ridged: Tensor, basis: Tensor, row: int) -> Tensor:
    """Add ``row`` to the orthonormal ``basis`` (s, n) of S: ``basis[a, j]`` is row j's coordinate along vector a.

    Gram-Schmidt in the Gram matrix. The coordinates of S itself are the Cholesky factor of ``ridged[S, S]``; what all
    rows' coordinates leave of their squared norms is D.
    """
    known = basis[:, row]
    left = ridged[row] - known @ basis
    return torch.cat([basis, (left / (ridged[row, row] - known.square().sum()).sqrt())[None]])


def _refit(
    ridged: Tensor, inner: Tensor, support: list[int], weights: Tensor, basis: Tensor, nonnegative: bool
) -> tuple[list[int], Tensor, Tensor]:
    """The exact weights on ``support``, from feasible ``weights``; rows whose weight turns <= 0 leave it.

    Lawson & Hanson's inner loop: walk towards the unconstrained optimum until the first weight reaches 0, drop that
    row, and start again. Each walk lowers the objective, and the support shrinks, so it ends.
    """
    while support:
        optimum = torch.cholesky_solve(inner[support][:, None], basis[:, support], upper=True)[:, 0]
        if not nonnegative or (optimum > 0).all():
            return support, optimum, basis
        step = torch.where(optimum <= 0, weights / (weights - optimum).clamp(min=1e-300), torch.inf)
        weights = weights + step.min() * (optimum - weights)
        drop = (step <= step.min()) | (weights <= 0)
        support = [row for row, out in zip(support, drop.tolist(), strict=True) if not out]
        weights, basis = weights[~drop], ridged[:0]
        for row in support:
            basis = _append(ridged, basis, row)
    return support, weights, basis
