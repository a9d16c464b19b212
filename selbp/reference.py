"""The specification in eager PyTorch: every backend is compared with these functions, in float64, and nothing else.

Notation (the same in names, docstrings and tests): ``n`` samples, ``d`` features, ``C`` classes, ``k`` kept rows.

    h_i   features   (n, d)   input of the last linear layer, the *head*
    W, c  weight, bias        the head, (C, d) and (C,)
    z_i   logits     (n, C)   W h_i + c, soft-capped where a cap is given
    p_i   probs      (n, C)   softmax(z_i)
    t_i   soft target(n, C)   t_ic = (1 - eps) w_y [c = y] + (eps / C) w_c       (eps label smoothing, w class weights)
    l_i   loss       (n,)     sum_c t_ic (lse_i - z_ic)
    r_i   residual   (n, C)   dl_i / d(W h_i + c) = (T_i p_i - t_i) * dcap,  T_i = sum_c t_ic
    g_i   gradient            r_i (x) [h_i, 1], of length C (d + 1); never materialised
    K     gram       (n, n)   K_ij = g_i . g_j = (r_i . r_j)(h_i . h_j + 1)
    M     mean gradient       (1 / n) sum_i g_i, the target of matching

Everything computes in the dtype it is given: hand it float64 to get the spec, float32 to get "eager torch".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from selbp.types import BatchStatistics, Matching, MatchStatus, MeanGradient

# --------------------------------------------------------------------------------------------- 1. statistics


def soft_cap(logits: Tensor, softcap: float) -> Tensor:
    """``softcap * tanh(logits / softcap)``; the identity where the cap is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def soft_target(
    target: Tensor, n_classes: int, class_weight: Tensor | None, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """(n, C) soft target t. ``target`` must lie in [0, C)."""
    w = torch.ones(n_classes, dtype=dtype, device=target.device) if class_weight is None else class_weight.to(dtype)
    onehot = torch.zeros(len(target), n_classes, dtype=dtype, device=target.device).scatter_(1, target[:, None], 1.0)
    return (1.0 - label_smoothing) * onehot * w + label_smoothing / n_classes * w


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None = None,  # (n, d)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    bias: bool = True,
) -> BatchStatistics:
    """Per-sample loss, gradient norms and correctness of ``n`` rows of logits.

    The target's logit is held apart and only the other classes are accumulated, so that neither the loss nor the
    norm cancels for confident rows: with q = 1 - p_y, both ``-log p_y = log1p(e^(m - z_y) s)`` and
    ``||r||^2 = q^2 + sum_{c != y} p_c^2`` keep their relative accuracy down to q = 1e-300.
    """
    n, n_classes = logits.shape
    present = (target != ignore_index) & (target >= 0) & (target < n_classes)
    y = torch.where(present, target, 0)[:, None]
    z = soft_cap(logits, softcap)
    z_y = z.gather(1, y)[:, 0]
    others = z.scatter(1, y, -torch.inf)
    lse = torch.logsumexp(z, 1)
    loss_y = torch.nn.functional.softplus(torch.logsumexp(others, 1) - z_y, threshold=40.0)  # lse - z_y
    t = soft_target(y[:, 0], n_classes, class_weight, label_smoothing, z.dtype)
    t_y = t.gather(1, y)[:, 0]
    spread = torch.where(t == 0, 0.0, t * (lse[:, None] - z)).scatter(1, y, 0.0).sum(1)  # 0 * inf is 0 here
    loss = torch.where(
        lse == torch.inf, torch.nan, t_y * loss_y + spread
    )  # a logit of +inf leaves no loss, as in torch

    residual_sq = residual(
        logits, target, lse, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap,
    ).square().sum(1)  # fmt: skip
    loss = torch.where(target == ignore_index, 0.0, torch.where(present, loss, torch.nan))
    residual_sq = torch.where(torch.isfinite(loss), residual_sq, torch.nan)
    if features is None:
        feature_sq = torch.ones_like(loss)
    else:
        feature_sq = features.square().sum(1) + float(bias)
    valid = present & torch.isfinite(torch.stack([loss, lse, residual_sq, feature_sq])).all(0)
    correct = valid & (z_y >= others.amax(1))
    return BatchStatistics(loss, lse, residual_sq, feature_sq, correct, valid)


def linear_cross_entropy_statistics(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> BatchStatistics:
    """:func:`cross_entropy_statistics` of ``features @ weight.T + bias``."""
    logits = torch.nn.functional.linear(features, weight, bias)
    return cross_entropy_statistics(
        logits, target, features, class_weight=class_weight, ignore_index=ignore_index,
        label_smoothing=label_smoothing, softcap=softcap, bias=bias is not None,
    )  # fmt: skip


def residual(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,)
    lse: Tensor,  # (n,) of the soft-capped logits
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """(n, C) gradient of each row's loss with respect to its logits (before the cap); 0 where the row is not valid.

    The target's entry is ``T p_y - t_y = (T - t_y) - T sum_{c != y} p_c``: ``p_y - 1`` would cancel.
    """
    n, n_classes = logits.shape
    present = (target != ignore_index) & (target >= 0) & (target < n_classes)
    y = torch.where(present, target, 0)[:, None]
    z = soft_cap(logits, softcap)
    probs = torch.exp(z - lse[:, None])
    t = soft_target(y[:, 0], n_classes, class_weight, label_smoothing, z.dtype)
    total = t.sum(1, keepdim=True)
    others = probs.scatter(1, y, 0.0).sum(1, keepdim=True)
    rest = t.scatter(1, y, 0.0).sum(1, keepdim=True)
    r = (total * probs - t).scatter(1, y, rest - total * others)
    if softcap:
        r = r * (1.0 - (z / softcap).square())
    finite = torch.isfinite(lse) & torch.isfinite(torch.where(t == 0, 0.0, z)).all(1)  # the loss is finite
    return torch.where((present & finite)[:, None], r, 0.0)


def sketch(
    features: Tensor,  # (n, T, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n, T)
    left: Tensor,  # (C, p)
    right: Tensor,  # (d, q), (d + 1, q) with a bias
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """(n, p, q) sketch ``sum_t (left^T r_t) (right^T [h_t, 1])^T`` of each sequence's head gradient."""
    n, length, d = features.shape
    h, y = features.reshape(n * length, d), target.reshape(n * length)
    logits = torch.nn.functional.linear(h, weight, bias)
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "softcap": softcap}
    stats = cross_entropy_statistics(logits, y, h, class_weight=class_weight, **options)  # type: ignore[arg-type]
    r = residual(logits, y, stats.lse, class_weight=class_weight, **options)  # type: ignore[arg-type]
    if bias is not None:
        h = torch.cat([h, h.new_ones(len(h), 1)], 1)
    h = torch.where(stats.valid[:, None], h, 0.0)
    return torch.einsum(
        "ntp,ntq->npq", (r @ left).view(n, length, left.shape[1]), (h @ right).view(n, length, right.shape[1])
    )


# ------------------------------------------------------------------------------- 2. Gram and mean gradient


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


# --------------------------------------------------------------------------------------------- 3. matching

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
    found = [_match_one(*problem, k, rule, ridge, nonnegative, tolerance, exact) for problem in problems]
    result = Matching(
        indices=inner.new_full((len(found), k), -1, dtype=torch.int64),
        weights=inner.new_zeros(len(found), k, dtype=torch.float64),
        count=inner.new_tensor([len(support) for support, *_ in found], dtype=torch.int32),
        residual=inner.new_tensor([residual for *_, residual, _ in found], dtype=torch.float64),
        status=inner.new_tensor([status for *_, status in found], dtype=torch.uint8),
    )
    for row, (support, weights, *_) in enumerate(found):
        result.indices[row, : len(support)] = torch.tensor(support, dtype=torch.int64)
        result.weights[row, : len(support)] = weights
    output = torch.float64 if exact else torch.float32
    return Matching(
        indices=result.indices.reshape(*batch, k),
        weights=result.weights.reshape(*batch, k).to(output),
        count=result.count.reshape(batch),
        residual=result.residual.reshape(batch).to(output),
        status=result.status.reshape(batch),
    )


def _match_one(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, k: int,
    rule: str, ridge: float, nonnegative: bool, tolerance: float, exact: bool,
) -> tuple[list[int], Tensor, float, MatchStatus]:  # fmt: skip
    """One problem in float64: support in order of choice, weights, relative residual, status."""
    pair = valid[:, None] & valid[None, :]
    gram, inner = torch.where(pair, gram, 0.0), torch.where(valid, inner, 0.0)
    if not (torch.isfinite(gram).all() and torch.isfinite(inner).all() and 0.0 <= target_sq < torch.inf):
        return [], inner[:0], float("nan"), MatchStatus.INVALID
    row_scale, mean_scale = _power_of_two(gram.diagonal().amax() if len(gram) else target_sq), _power_of_two(target_sq)
    gram, inner = gram * row_scale * row_scale, inner * row_scale * mean_scale
    target_sq = target_sq * mean_scale * mean_scale

    support, weights, status = _pursue(gram, inner, target_sq, valid, k, rule, ridge, nonnegative, tolerance, exact)
    explained = 2.0 * weights @ inner[support] - weights @ gram[support][:, support] @ weights
    residual_sq = (target_sq - explained).clamp(min=0.0) / target_sq if target_sq > 0 else target_sq
    return support, weights * (row_scale / mean_scale), float(residual_sq.sqrt()), status


def _power_of_two(square: Tensor) -> Tensor:
    """A power of two s with s^2 * ``square`` in [1, 4), or 1 where ``square`` is 0. Scaling by it is exact."""
    exponent = torch.frexp(square).exponent - 1  # square in [2^e, 2^(e + 1))
    return torch.ldexp(torch.ones_like(square), -exponent.div(2, rounding_mode="floor")) if square > 0 else square + 1.0


def _pursue(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, k: int,
    rule: str, ridge: float, nonnegative: bool, tolerance: float, exact: bool,
) -> tuple[list[int], Tensor, MatchStatus]:  # fmt: skip
    """The greedy loop on a scaled problem whose invalid rows are zero."""
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
