"""Choosing k rows on the device: by rank, and at random with known inclusion probabilities.

Nothing here reads a value back to the host: shapes depend on n and k alone, and rows that do not exist are masked.
Probabilities are float64, whatever the statistics are. The torch functions are the specification and the CUDA
backend; on a CPU they would be sixty small operators, so csrc/choose_rows does the same in one call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import check_choice, check_dtype, check_same_device, check_shape
from selbp.ops._register import define, library
from selbp.types import Selection

RULES = ("top", "odds", "rank")  # both in the order of csrc/choose_rows/cpu.hpp
WEIGHTS = ("mean", "batch", "unbiased")

_Pair = tuple[Tensor, Tensor]


def choose_rows(
    score: Tensor,  # (n,)
    valid: Tensor,  # (n,) bool
    k: int,
    *,
    rule: str,
    weights: str,
    dtype: torch.dtype,  # of the weights
    generator: torch.Generator | None = None,
) -> Selection:
    """Choose exactly k of the ``valid`` rows whose ``score`` is finite, and weight them.

    ``rule`` is ``"top"``: the greatest scores, greatest first, the lower index first among equals. Or a draw without
    replacement from ``generator``, rows in ascending order, with inclusion probabilities proportional, up to 1, to
    the scores (``"odds"``; none at 0 or below) or to ``((rank + 1/2) / v)^(max(v / k, 1) - 1)``, rank 0 the least of
    the v scores (``"rank"``). ``weights``: see :func:`slot_weights`. Where fewer rows can be chosen than k, the other
    slots repeat the first one (row 0 where there is none) with weight 0.
    """
    draws = None if rule == "top" else uniform(len(score) + 1, score, generator)
    indices, found = _choose_rows(score.double(), valid, draws, k, rule, weights)
    return Selection(indices, found.to(dtype))


def specified(score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str) -> _Pair:
    """The same in plain torch. ``draws`` (n + 1,) float64: what orders the rows, and the offset of the sample."""
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


def _check(score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str) -> None:
    check_dtype("score", score, torch.float64)
    check_shape("score", score, "(n,)", (None,))
    n = score.shape[0]
    check_dtype("valid", valid, torch.bool)
    check_shape("valid", valid, f"(n,) with n = {n} as score", (n,))
    check_same_device("valid", valid, "score", score)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    for name, value, known in (("rule", rule, RULES), ("weights", weights, WEIGHTS)):
        check_choice(name, value, known)
    if draws is not None:
        check_dtype("draws", draws, torch.float64)
        check_shape("draws", draws, f"(n + 1,) with n = {n} as score", (n + 1,))
        check_same_device("draws", draws, "score", score)
    elif rule != "top":
        raise ValueError(f"draws must be given for rule {rule!r}, got None")


def _cpu(score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str) -> _Pair:
    n = len(score)
    score, valid = score.contiguous(), valid.contiguous()
    draws = None if draws is None else draws.contiguous()
    indices, found, scratch = valid.new_empty(k, dtype=torch.int64), score.new_empty(k), score.new_empty(7 * n)
    _native.choose_rows(
        n, k, score.data_ptr(), valid.data_ptr(), 0 if draws is None else draws.data_ptr(), RULES.index(rule),
        WEIGHTS.index(weights), indices.data_ptr(), found.data_ptr(), scratch.data_ptr(),
    )  # fmt: skip
    return indices, found


def _fake(score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str) -> _Pair:
    return score.new_empty(k, dtype=torch.int64), score.new_empty(k)


def _one_by_one(operator: Any, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """``torch.vmap``'s rule: the draws of each, one after another."""
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, dims, strict=True)]
    each = [
        operator(*(x if dim is None else x[i] for x, dim in zip(moved, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(field) for field in zip(*each, strict=True)), (0, 0)


_choose_rows = define(
    "choose_rows(Tensor score, Tensor valid, Tensor? draws, SymInt k, str rule, str weights) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=specified,
)


def percentile(history: Tensor, loss: Tensor) -> _Pair:
    """The last losses with these among them, (length,) float64, and the share of those below each (n,) float64.

    ``history`` (length,) and ``loss`` (n,) float64: NaN where there is none. ``loss`` enters first, newest last.
    """
    entered, share = _percentile(history, loss)
    return entered, share


def specified_percentile(history: Tensor, loss: Tensor) -> _Pair:
    """The same in plain torch."""
    seen = torch.cat([history, loss])
    order = torch.isfinite(seen).to(torch.int8).argsort(stable=True)  # gaps first, then the losses as they came
    entered = seen[order][-len(history) :]
    known = torch.isfinite(entered)
    ranked = torch.where(known, entered, torch.inf).sort().values
    below = torch.searchsorted(ranked, torch.where(torch.isfinite(loss), loss, 0.0))
    return torch.where(known, entered, torch.nan), below.double() / known.sum().clamp(min=1)


def _check_percentile(history: Tensor, loss: Tensor) -> None:
    for name, tensor, letter in (("history", history, "(length,)"), ("loss", loss, "(n,)")):
        check_dtype(name, tensor, torch.float64)
        check_shape(name, tensor, letter, (None,))
    check_same_device("loss", loss, "history", history)


def _cpu_percentile(history: Tensor, loss: Tensor) -> _Pair:
    history, loss = history.contiguous(), loss.contiguous()
    entered, share, scratch = torch.empty_like(history), torch.empty_like(loss), history.new_empty(4 * len(history))
    _native.percentile(
        len(loss), len(history), loss.data_ptr(), history.data_ptr(), entered.data_ptr(), share.data_ptr(),
        scratch.data_ptr(),
    )  # fmt: skip
    return entered, share


_percentile = define(
    "percentile(Tensor history, Tensor loss) -> (Tensor, Tensor)",
    check=_check_percentile,
    fake=lambda history, loss: (torch.empty_like(history), torch.empty_like(loss)),
    cpu=_cpu_percentile,
    cuda=specified_percentile,
)

for _name, _operator in (("choose_rows", _choose_rows), ("percentile", _percentile)):
    torch.library.register_vmap(f"selbp::{_name}", functools.partial(_one_by_one, _operator), lib=library)
