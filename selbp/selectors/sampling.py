"""Choosing k rows on the device: by rank, and at random with known inclusion probabilities.

Nothing here reads a value back to the host: shapes depend on n and k alone, and rows that do not exist are masked.
Probabilities are float64, whatever the statistics are.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


def systematic(probability: Tensor, generator: torch.Generator | None) -> Tensor:
    """(n,) bool: each row is in with its ``probability`` (n,) float64, and their number is always the sum of those.

    Systematic sampling in random order (Madow 1949; Hartley & Rao 1962): the probabilities laid end to end in a random
    order, one uniform offset u, and a row is in where an integer + u falls on its interval. Rows of probability 1 are
    in beforehand.
    """
    certain = probability >= 1.0
    rest = torch.where(certain, 0.0, probability)
    total = rest.sum().round()  # an integer up to rounding: make it one
    order = uniform(len(rest), rest, generator).argsort()
    edges = rest[order].cumsum(0)
    edges = torch.where(edges[-1:] > 0, edges / edges[-1:] * total, 0.0)
    offset = uniform(1, rest, generator)
    crossings = torch.floor(torch.cat([-offset, edges - offset]))
    hit = crossings[1:] > crossings[:-1]
    return torch.zeros_like(hit).scatter(0, order, hit) | certain


def sample_rows(odds: Tensor, k: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly k rows without replacement, with inclusion probabilities proportional to ``odds`` (n,), up to 1.

    Returns indices (k,) in ascending order, which slots are real (k,), and the inclusion probability of each slot's
    row (k,) float64. Rows of odds 0 are never drawn: where fewer than k rows have any, the other slots are spare.
    """
    probability = inclusion_probabilities(odds, k)
    hits = systematic(probability, generator)
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
