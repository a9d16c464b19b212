"""Choosing k rows by rank, and at random with known inclusion probabilities.

Nothing reads a value back to the host: shapes depend on n and k alone, and rows that do not exist are masked.
Probabilities are float64, whatever the statistics are.
"""

from __future__ import annotations

import torch
from torch import Tensor

DECIDED = 1e-9  # distance from 0 or 1 that is rounding


def choose_rows(
    score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str
) -> tuple[Tensor, Tensor]:
    """What ``selbp.ops.choose_rows`` chooses.

    ``draws`` (n + 1,) float64: what orders the rows, and the offset of the sample.
    """
    score = score.double()
    eligible = valid & torch.isfinite(score)
    if draws is None:
        indices, real = top_rows(score, eligible, k)
        return indices, slot_weights(weights, valid, real)
    odds = rank_odds(score, eligible, k) if rule == "rank" else score.clamp(min=0.0)
    indices, real, probability = sample_rows(torch.where(eligible, odds, 0.0), k, draws)
    return indices, slot_weights(weights, valid, real, probability)


def slot_weights(weights: str, valid: Tensor, real: Tensor, expected: Tensor | None = None) -> Tensor:
    """(k,) float64 weights, 0 for slots that are not ``real`` (k,) bool; ``valid`` (n,) are the rows with a gradient.

    With v valid rows and m real slots: ``"mean"`` v / (n m), ``"batch"`` 1 / n, ``"unbiased"`` 1 / (n E_j), E_j =
    ``expected`` (k,) > 0 being how often slot j's row is drawn in expectation.
    """
    n = valid.shape[0]
    if weights == "mean":
        return real * (valid.sum().double() / (n * real.sum().clamp(min=1)))
    if weights == "batch" or expected is None:
        return real.double() / n
    return torch.where(real, 1.0 / (n * torch.where(real, expected, 1.0)), 0.0)


def top_rows(key: Tensor, eligible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k eligible rows of greatest key, the lower index first among equals.

    ``key`` (n,) finite where ``eligible`` (n,) bool. Returns indices (k,) int64 and which slots are real (k,) bool:
    slots beyond the number of eligible rows repeat the first row chosen (row 0 where there is none).
    """
    order = torch.where(eligible, key, -torch.inf).sort(descending=True, stable=True).indices[:k]
    return fill_spare(order, torch.arange(k, device=key.device) < eligible.sum(), eligible)


def fill_spare(indices: Tensor, real: Tensor, eligible: Tensor) -> tuple[Tensor, Tensor]:
    """``indices`` (k,) with the slots that are not ``real`` (k,) pointing at an eligible row, else at row 0.

    Real slots come first. The row repeated is the first one chosen, or where none was the first eligible one.
    """
    first_eligible = eligible.to(torch.int8).argmax(0, keepdim=True)
    spare = torch.where(real[:1], indices[:1], first_eligible)
    return torch.where(real, indices, spare), real


def inclusion_probabilities(odds: Tensor, k: int) -> Tensor:
    """(n,) float64 probabilities ``min(1, c odds_i)`` that sum to k, or to the number of positive odds if that is less.

    ``odds`` (n,) finite and nonnegative. Sorted downward, the rows that reach 1 are a prefix; it ends at the first j
    where an equal share ``(k - j) odds_j / sum_(i >= j) odds_i`` of what is left does not exceed 1.
    """
    odds = odds.double()
    ranked = odds.sort(descending=True).values
    tail = ranked.flip(0).cumsum(0).flip(0)
    slots = k - torch.arange(len(odds), device=odds.device)
    certain = ((slots * ranked <= tail).cumsum(0) == 0).sum(0, keepdim=True)
    beyond = certain >= len(odds)  # all rows are certain
    last = certain.clamp(max=len(odds) - 1)
    scale = torch.where(beyond, torch.inf, slots.gather(0, last) / tail.gather(0, last))
    return torch.where(odds > 0, (scale * odds).clamp(max=1.0), 0.0)


def rank_odds(score: Tensor, eligible: Tensor, k: int) -> Tensor:
    """(n,) float64 ``((rank + 1/2) / v)^(max(v / k, 1) - 1)`` of the v ``eligible`` rows, the lower index first."""
    order = torch.where(eligible, score, torch.inf).argsort(stable=True)
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    count = eligible.sum().clamp(min=1).double()
    return ((rank.double() + 0.5) / count).pow((count / k - 1.0).clamp(min=0.0))


def systematic(probability: Tensor, draws: Tensor) -> Tensor:
    """(n,) bool: each row is in with its ``probability`` (n,) float64, and their number is always the sum of those.

    Systematic sampling in random order (Madow 1949; Hartley & Rao 1962): the probabilities laid end to end in a random
    order, one uniform offset u, and a row is in where an integer + u falls on its interval. Rows of probability 1 are
    in beforehand. ``draws`` (n + 1,) are uniform: the first n give the order, the last is u.
    """
    certain = probability >= 1.0
    rest = torch.where(certain, 0.0, probability)
    total = rest.sum().round()  # an integer up to rounding: make it one
    order = draws[:-1].argsort()
    edges = rest[order].cumsum(0)
    edges = torch.where(edges[-1:] > 0, edges / edges[-1:] * total, 0.0)
    offset = draws[-1:]
    crossings = torch.floor(torch.cat([-offset, edges - offset]))
    hit = crossings[1:] > crossings[:-1]
    return torch.zeros_like(hit).scatter(0, order, hit) | certain


def sample_rows(odds: Tensor, k: int, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly k rows without replacement, with inclusion probabilities proportional to ``odds`` (n,), up to 1.

    ``draws`` as :func:`systematic` takes them. Returns indices (k,) in ascending order, which slots are real (k,), and
    the inclusion probability of each slot's row (k,) float64. Rows of odds 0 are never drawn: where fewer than k rows
    have any, the other slots are spare.
    """
    probability = inclusion_probabilities(odds, k)
    hits = systematic(probability, draws)
    indices, real = top_rows(torch.zeros_like(probability), hits, k)
    return indices, real, probability[indices]


def sample_with_replacement(odds: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Draw k times independently, with chances proportional to ``odds`` (n,).

    Returns indices (k,), which slots are real (k,), all or none (no positive odds), and the chance of each slot's row
    in one draw (k,) float64.
    """
    odds = odds.double()
    edges = odds.cumsum(0)
    total = edges[-1:]
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding must not carry a point past the last edge
    points = torch.minimum(uniform(k, odds, generator) * total, below)
    indices = torch.searchsorted(edges, points, right=True).clamp(max=len(odds) - 1)
    indices, real = fill_spare(indices, (total > 0).expand(k), odds > 0)
    return indices, real, torch.where(real, odds[indices] / total, 0.0)


def uniform(count: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """(count,) float64 draws from [0, 1) on ``like``'s device: the only source of chance of every rule."""
    return torch.rand(count, dtype=torch.float64, device=like.device, generator=generator)


def percentile(history: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """What ``selbp.ops.choose_rows.percentile`` returns: the losses entered, and the share of those below each."""
    seen = torch.cat([history, loss])
    order = torch.isfinite(seen).to(torch.int8).argsort(stable=True)  # gaps first, then the losses as they came
    entered = seen[order][-len(history) :]
    known = torch.isfinite(entered)
    ranked = torch.where(known, entered, torch.inf).sort().values
    below = torch.searchsorted(ranked, torch.where(torch.isfinite(loss), loss, 0.0))
    return torch.where(known, entered, torch.nan), below.double() / known.sum().clamp(min=1)


def cube_sample(balance: Tensor, probability: Tensor, order: Tensor, draws: Tensor) -> Tensor:
    """The cube method, described in ``selbp.ops.cube``: n steps of fixed shapes without asking the device.

    ``order`` (n,) is the order in which units are looked at, ``draws`` (n,) the uniform draw of each step.
    """
    n, p = balance.shape
    point = probability.clone()
    columns = torch.cat([torch.ones_like(probability)[:, None], balance / probability.clamp(min=1e-300)[:, None]], 1)
    slots = torch.arange(p + 2, device=balance.device)
    for step in range(n):
        undecided = (point > DECIDED) & (point < 1 - DECIDED)
        point = torch.where(undecided, point, (point >= 0.5).to(point))
        # The first p + 2 undecided units; beyond their number, slots repeat units that stay where they are.
        group = order[(~undecided[order]).to(torch.int8).argsort(stable=True)[: p + 2]]
        live = undecided[group]
        used = slots[: len(group)]
        count = live.sum()
        constraints = torch.minimum(count - 1, torch.full_like(count, p + 1)).clamp(min=0)  # q, of q + 1 units
        rows = columns[group].t()[: len(group) - 1]  # (p + 1, p + 2), of which q x (q + 1) are in use
        inside = (used[:-1, None] < constraints) & (used <= constraints)
        fixed = (used[:-1, None] >= constraints) & (used == used[:-1, None] + 1)  # every other unit stays
        matrix = torch.where(inside, rows, fixed.to(rows))
        direction = torch.linalg.qr(matrix.t(), mode="complete").Q[:, -1]
        direction = torch.where(live & (used <= constraints), direction, 0.0)
        size = direction.abs()
        lead = direction.gather(0, (size > 1e-9 * size.max()).to(torch.int8).argmax(0, keepdim=True))
        direction = torch.where(lead < 0, -direction, direction) / size.max().clamp(min=1e-300)
        moves = direction.abs() > 1e-14
        here = point[group]
        ahead = torch.where(direction > 0, 1 - here, here) / direction.abs()
        behind = torch.where(direction > 0, here, 1 - here) / direction.abs()
        up, down = (torch.where(moves, way, torch.inf).min() for way in (ahead, behind))
        move = torch.where(draws[step] * (up + down) < down, up, -down)
        point = point.scatter(0, group, torch.where(moves & (count >= 2), here + move * direction, here))
    return point >= 0.5
