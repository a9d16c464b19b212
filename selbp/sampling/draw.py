"""Drawing rows of a pool by the odds of a table: plain torch, which is the specification, and the native call.

The generator is SplitMix64's sequence (Steele, Lea & Flood 2014), read at the sample's number: a draw follows from
(seed, step, id) alone, whatever the threads, the workers and the rest of the pool.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from selbp import _native
from selbp.ops.choose_rows import RULES, WEIGHTS
from selbp.ops.choose_rows import _choose_rows as choose

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_ALL = (1 << 64) - 1
_LEAST = 1e-12  # of the largest odds: every sample can be drawn when there is nothing else


class Columns(NamedTuple):
    """What a table holds of each of N samples; the entry after the last one takes what is to be dropped."""

    probability: Tensor  # (N + 1,) float32, of the given label; NaN: unknown
    responsibility: Tensor  # (N + 1,) float32, P(the label is right); NaN: unknown
    label: Tensor  # (N + 1,) int32, as given; -1: unknown
    rival: Tensor  # (N + 1,) int32, the most probable other label; -1: unknown
    seen: Tensor  # (N + 1,) int64, when it was last trained on; 0: scored by a proxy, -1: never

    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of the first entries."""
        a, b, c, d, e = self
        return a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), e.data_ptr()


@dataclass(frozen=True)
class Odds:
    """``responsibility * (1 - p)^power + floor * mean``, the mean being the pool's."""

    power: float = 0.5
    floor: float = 0.1


def _mixed(x: int) -> int:
    x = (x ^ x >> 30) * _FACTORS[0] & _ALL
    x = (x ^ x >> 27) * _FACTORS[1] & _ALL
    return x ^ x >> 31


def _signed(x: int) -> int:
    x &= _ALL
    return x - (1 << 64) if x >> 63 else x


def uniform(seed: int, step: int, stream: int, ids: Tensor) -> Tensor:
    """(n,) float64 on (0, 1), one for each of ``ids`` (n,) int64: the same on every device."""
    origin = _mixed(_mixed(_mixed(seed + _GOLDEN & _ALL) + step + _GOLDEN & _ALL) + stream + _GOLDEN & _ALL)
    x = (ids + 1) * _signed(_GOLDEN) + _signed(origin)
    for shift, factor in ((30, _FACTORS[0]), (27, _FACTORS[1])):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    x = x ^ (x >> 31 & (1 << 33) - 1)
    return ((x >> 12 & (1 << 52) - 1).double() + 0.5) * 2.0**-52


def odds_of(table: Columns, ids: Tensor, odds: Odds, factor: Tensor | None) -> Tensor:
    """(pool,) float64 positive odds of ``ids`` (pool,); a sample that is not known has the mean of the others.

    ``factor`` (classes,) float64 multiplies those of each given label.
    """
    wrong = 1.0 - table.probability[ids].double()
    value = table.responsibility[ids].double() * wrong.clamp(min=0.0).pow(odds.power)
    known = (wrong <= 1.0) & (value >= 0.0)
    if factor is not None:
        label = table.label[ids].long()
        value, known = value * factor[label.clamp(min=0)], known & (label >= 0)
    value = torch.where(known, value, 0.0)
    mean, largest = value.sum() / known.sum().clamp(min=1), value.max()
    found = torch.where(known, value, mean) + odds.floor * mean
    return torch.where(largest > 0, torch.maximum(found, _LEAST * largest), 1.0)


def specified(
    table: Columns,
    ids: Tensor,
    k: int,
    uniform_rows: int,
    odds: Odds,
    factor: Tensor | None,
    seed: int,
    step: int,
    unbiased: bool,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`draw`: the same in plain torch, which waits for no device."""
    first = uniform(seed, step, 0, ids).sort(stable=True).indices[:uniform_rows]
    if uniform_rows >= k:
        return first, torch.full((k,), 1.0 / k, dtype=torch.float64, device=ids.device) if unbiased else None
    found = odds_of(table, ids, odds, factor).scatter(0, first, 0.0)
    if unbiased:
        draws = uniform(seed, step, 1, torch.cat([ids, ids.new_full((1,), -1)]))
        return _unbiased(first, found, draws, k)
    keys = torch.where(found > 0, -uniform(seed, step, 1, ids).log() / found, torch.inf)
    return torch.cat([first, keys.sort(stable=True).indices[: k - uniform_rows]]), None


@functools.lru_cache(maxsize=8)
def _all_valid(pool: int) -> Tensor:
    return torch.ones(pool, dtype=torch.bool, device="cpu")


def _unbiased(first: Tensor, odds: Tensor, draws: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rows ``first`` (u,) at 1 / n each, and k - u of the others by systematic sampling at 1 / (n pi)."""
    valid = torch.ones_like(odds, dtype=torch.bool)
    rows, weights = choose(odds, valid, draws, k - len(first), "odds", "unbiased")
    return torch.cat([first, rows]), torch.cat(
        [torch.full_like(weights[:1], 1.0 / len(odds)).expand(len(first)), weights]
    )


def draw(
    table: Columns,
    ids: Tensor,
    k: int,
    uniform_rows: int,
    odds: Odds,
    factor: Tensor | None,
    seed: int,
    step: int,
    unbiased: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draw k of the samples ``ids`` (pool,) int64: ``uniform_rows`` of them uniformly, the others by their odds.

    The others are drawn one after another without replacement, each with a chance in proportion to its odds among
    those that are left (Gumbel top-k, Kool et al. 2019), or, if ``unbiased``, by systematic sampling with known
    inclusion probabilities pi.

    Returns:
        Places in the pool (k,) int64, the uniform ones first; and weights (k,) float64 or None. With m = pool, a
        uniform row has the weight 1 / m and another 1 / (m pi), pi given which rows are the uniform ones: whatever
        those are, E[sum w g] = (1/m) (sum over them of g + sum over the rest of g), the pool's mean. Where all k rows
        are uniform, the weights are 1 / k.
    """
    if ids.device.type != "cpu":
        return specified(table, ids, k, uniform_rows, odds, factor, seed, step, unbiased)
    ids, factor = ids.contiguous(), None if factor is None else factor.contiguous()
    pool = len(ids)
    second = unbiased and uniform_rows < k
    scratch = torch.empty((9 * pool if second else pool) + 1 + 2 * k, dtype=torch.float64, device="cpu")
    rows, address = torch.empty(k, dtype=torch.int64, device="cpu"), scratch.data_ptr()
    heap = address + 8 * (len(scratch) - 2 * k)
    _native.draw(
        pool,
        k,
        uniform_rows,
        ids.data_ptr(),
        table.addresses(),
        0 if factor is None else factor.data_ptr(),
        odds.power,
        odds.floor,
        seed,
        step,
        rows.data_ptr(),
        address,
        address + 8 * pool if second else 0,
        heap,
    )
    if not second:
        return rows, torch.full((k,), 1.0 / k, dtype=torch.float64, device="cpu") if unbiased else None
    weights, valid = torch.full((k,), 1.0 / pool, dtype=torch.float64, device="cpu"), _all_valid(pool)
    _native.choose_rows(  # as in _unbiased, straight to the slots after the uniform rows
        pool,
        k - uniform_rows,
        address,
        valid.data_ptr(),
        address + 8 * pool,
        RULES.index("odds"),
        WEIGHTS.index("unbiased"),
        rows.data_ptr() + 8 * uniform_rows,
        weights.data_ptr() + 8 * uniform_rows,
        address + 8 * (2 * pool + 1),
    )
    return rows, weights
