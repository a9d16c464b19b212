"""Choosing k rows on the device: by rank, and at random with known inclusion probabilities.

The specification, ``selbp.reference.sampling``, runs about eighty small operators. On a CPU csrc/choose_rows does the
same in one call, on a GPU csrc/selection in one launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from selbp import _native, reference
from selbp._checks import check_choice, check_dtype, check_floating, check_same_device, check_shape
from selbp.ops import _choice_cuda
from selbp.ops._factors import in_dtype
from selbp.ops._register import define, library
from selbp.reference.sampling import uniform
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
    the v scores (``"rank"``). ``weights``: see :func:`selbp.reference.sampling.slot_weights`. Where fewer rows
    can be chosen than k, the other slots repeat the first one (row 0 where there is none) with weight 0.
    """
    draws = None if rule == "top" else uniform(score.shape[0] + 1, score, generator)
    indices, found = _choose_rows(score, valid, draws, k, rule, weights, dtype == torch.float32)
    return Selection(indices, in_dtype(found, dtype))


def _check(
    score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str, single: bool = False
) -> None:
    check_floating("score", score)
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


def _cpu(
    score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str, single: bool = False
) -> _Pair:
    indices, found = rows_of_odds(score.double(), valid, draws, k, rule, weights)
    return indices, found.float() if single else found


def rows_of_odds(score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str) -> _Pair:
    """The native kernel: indices (k,) and weights (k,) float64 for a score (n,) float64."""
    n = score.shape[0]  # len() costs half a microsecond more
    score, valid = score.contiguous(), valid.contiguous()
    draws = None if draws is None else draws.contiguous()
    indices, found, scratch = valid.new_empty(k, dtype=torch.int64), score.new_empty(k), score.new_empty(7 * n)
    _native.choose_rows(
        n,
        k,
        score.data_ptr(),
        valid.data_ptr(),
        0 if draws is None else draws.data_ptr(),
        RULES.index(rule),
        WEIGHTS.index(weights),
        indices.data_ptr(),
        found.data_ptr(),
        scratch.data_ptr(),
    )
    return indices, found


def _cuda(
    score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str, single: bool = False
) -> _Pair:
    made = _choice_cuda.choose(score, valid, draws, k, rule, weights, single)
    if made is not None:
        return made[0], made[1]
    indices, found = reference.choose_rows(score, valid, draws, k, rule, weights)
    return indices, found.float() if single else found


def _fake(
    score: Tensor, valid: Tensor, draws: Tensor | None, k: int, rule: str, weights: str, single: bool = False
) -> _Pair:
    dtype = torch.float32 if single else torch.float64
    return score.new_empty(k, dtype=torch.int64), score.new_empty(k, dtype=dtype)


def _one_by_one(operator: Any, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """``torch.vmap``'s rule: the draws of each, one after another."""
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(arguments, dims, strict=True)]
    each = [
        operator(*(x if dim is None else x[i] for x, dim in zip(moved, dims, strict=True)))
        for i in range(info.batch_size)
    ]
    fields = tuple(torch.stack(field) for field in zip(*each, strict=True))
    return fields, (0,) * len(fields)


_choose_rows = define(
    "choose_rows(Tensor score, Tensor valid, Tensor? draws, SymInt k, str rule, str weights, bool single=False)"
    " -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)


def percentile(history: Tensor, loss: Tensor) -> _Pair:
    """The last losses with these among them, (length,) float64, and the share of those below each (n,) float64.

    ``history`` (length,) and ``loss`` (n,) float64: NaN where there is none. ``loss`` enters first, newest last.
    """
    entered, share = _percentile(history, loss)
    return entered, share


def _check_percentile(history: Tensor, loss: Tensor) -> None:
    for name, tensor, letter in (("history", history, "(length,)"), ("loss", loss, "(n,)")):
        check_dtype(name, tensor, torch.float64)
        check_shape(name, tensor, letter, (None,))
    check_same_device("loss", loss, "history", history)


def _cpu_percentile(history: Tensor, loss: Tensor) -> _Pair:
    history, loss = history.contiguous(), loss.contiguous()
    entered, share, scratch = torch.empty_like(history), torch.empty_like(loss), history.new_empty(4 * len(history))
    _native.percentile(
        len(loss),
        len(history),
        loss.data_ptr(),
        history.data_ptr(),
        entered.data_ptr(),
        share.data_ptr(),
        scratch.data_ptr(),
    )
    return entered, share


_percentile = define(
    "percentile(Tensor history, Tensor loss) -> (Tensor, Tensor)",
    check=_check_percentile,
    fake=lambda history, loss: (torch.empty_like(history), torch.empty_like(loss)),
    cpu=_cpu_percentile,
    cuda=reference.percentile,
)

for _name, _operator in (("choose_rows", _choose_rows), ("percentile", _percentile)):
    torch.library.register_vmap(f"selbp::{_name}", functools.partial(_one_by_one, _operator), lib=library)
