"""Whole choices, each one operator: by the loss's percentile, by the gradients' norms, balanced, and diversified.

The specification and the backend of a CPU are in ``selbp.reference.choices``; on a GPU each is one launch
(csrc/selection) where torch's operators would take dozens to thousands.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from selbp._checks import check_choice, check_dtype, check_floating, check_same_device, check_shape
from selbp.ops import _choice_cuda
from selbp.ops import cube as cube_operator
from selbp.ops._register import define, library
from selbp.ops.choose_rows import WEIGHTS, _one_by_one, percentile, rows_of_odds
from selbp.reference import choices

_Pair = tuple[Tensor, Tensor]
_Three = tuple[Tensor, Tensor, Tensor]
F64 = torch.float64


def _check_rows(name: str, of: Tensor, n: int, valid: Tensor, k: int) -> None:
    check_dtype("valid", valid, torch.bool)
    check_shape("valid", valid, f"(n,) with n = {n} as {name}", (n,))
    check_same_device("valid", valid, name, of)
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")


def _check_double(name: str, x: Tensor, shape: tuple[int | None, ...], words: str, like: str, of: Tensor) -> None:
    check_dtype(name, x, F64)
    check_shape(name, x, words, shape)
    check_same_device(name, x, like, of)


def _check_norm(
    residual_sq: Tensor, feature_sq: Tensor | None, valid: Tensor, draws: Tensor, tau: Tensor, k: int, weights: str,
    momentum: float, threshold: float | None, single: bool,
) -> None:  # fmt: skip
    check_floating("residual_sq", residual_sq)
    check_shape("residual_sq", residual_sq, "(n,)", (None,))
    n = residual_sq.shape[0]
    _check_rows("residual_sq", residual_sq, n, valid, k)
    if feature_sq is not None:
        check_dtype("feature_sq", feature_sq, residual_sq.dtype)
        check_shape("feature_sq", feature_sq, f"(n,) with n = {n} as residual_sq", (n,))
        check_same_device("feature_sq", feature_sq, "residual_sq", residual_sq)
    _check_double("draws", draws, (n + 1,), f"(n + 1,) with n = {n} as residual_sq", "residual_sq", residual_sq)
    _check_double("tau", tau, (), "()", "residual_sq", residual_sq)
    check_choice("weights", weights, WEIGHTS)


def _cpu_norm(
    residual_sq: Tensor, feature_sq: Tensor | None, valid: Tensor, draws: Tensor, tau: Tensor, k: int, weights: str,
    momentum: float, threshold: float | None, single: bool,
) -> _Three:  # fmt: skip
    odds, mean = choices.norm_odds(residual_sq, feature_sq, valid, tau, momentum, threshold)
    indices, found = rows_of_odds(odds.double(), valid, draws, k, "odds", weights)
    return indices, _as(found, single), mean


def _cuda_norm(
    residual_sq: Tensor, feature_sq: Tensor | None, valid: Tensor, draws: Tensor, tau: Tensor, k: int, weights: str,
    momentum: float, threshold: float | None, single: bool,
) -> _Three:  # fmt: skip
    made = _choice_cuda.choose(
        residual_sq, valid, draws, k, "norm", weights, single, second=feature_sq, before=tau, momentum=momentum,
        threshold=threshold,
    )  # fmt: skip
    if made is not None and made[2] is not None:
        return made[0], made[1], made[2]
    indices, found, mean = choices.choose_by_norm(
        residual_sq, feature_sq, valid, draws, tau, k, weights, momentum, threshold
    )
    return indices, _as(found, single), mean


def _check_percentile(
    loss: Tensor, valid: Tensor, history: Tensor, draws: Tensor, k: int, weights: str, power: float, least: float,
    single: bool,
) -> None:  # fmt: skip
    check_floating("loss", loss)
    check_shape("loss", loss, "(n,)", (None,))
    n = loss.shape[0]
    _check_rows("loss", loss, n, valid, k)
    _check_double("history", history, (None,), "(length,)", "loss", loss)
    _check_double("draws", draws, (n + 1,), f"(n + 1,) with n = {n} as loss", "loss", loss)
    check_choice("weights", weights, WEIGHTS)


def _cpu_percentile(
    loss: Tensor, valid: Tensor, history: Tensor, draws: Tensor, k: int, weights: str, power: float, least: float,
    single: bool,
) -> _Three:  # fmt: skip
    odds, entered = choices.percentile_odds(loss, valid, history, power, least, percentile)
    indices, found = rows_of_odds(odds, valid, draws, k, "odds", weights)
    return indices, _as(found, single), entered


def _cuda_percentile(
    loss: Tensor, valid: Tensor, history: Tensor, draws: Tensor, k: int, weights: str, power: float, least: float,
    single: bool,
) -> _Three:  # fmt: skip
    made = None
    if len(history):
        made = _choice_cuda.choose(
            loss, valid, draws, k, "percentile", weights, single, before=history, power=power, least=least
        )
    if made is not None and made[2] is not None:
        return made[0], made[1], made[2]
    indices, found, entered = choices.choose_by_percentile(loss, valid, history, draws, k, weights, power, least)
    return indices, _as(found, single), entered


def _check_balanced(
    gram: Tensor, valid: Tensor, mixture: Tensor, draws: Tensor, k: int, by_norm: bool, single: bool
) -> None:
    n = _check_gram(gram)
    _check_rows("gram", gram, n, valid, k)
    _check_double("mixture", mixture, (n, None), f"(n, p - 1) with n = {n} as gram", "gram", gram)
    _check_double("draws", draws, (2, n), f"(2, n) with n = {n} as gram", "gram", gram)


def _check_gram(gram: Tensor) -> int:
    check_floating("gram", gram)
    check_shape("gram", gram, "(n, n)", (None, gram.shape[0] if gram.dim() else None))
    return gram.shape[0]


def _cpu_balanced(
    gram: Tensor, valid: Tensor, mixture: Tensor, draws: Tensor, k: int, by_norm: bool, single: bool
) -> _Pair:
    indices, found = choices.choose_balanced(gram, valid, mixture, draws, k, by_norm, cube_operator._cpu)
    return indices, _as(found, single)


def _cuda_balanced(
    gram: Tensor, valid: Tensor, mixture: Tensor, draws: Tensor, k: int, by_norm: bool, single: bool
) -> _Pair:
    made = _choice_cuda.balanced(gram, valid, mixture, draws, k, by_norm, single)
    if made is not None:
        return made
    indices, found = choices.choose_balanced(gram, valid, mixture, draws, k, by_norm)
    return indices, _as(found, single)


def _check_diverse(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, draws: Tensor, k: int, weights: str, single: bool
) -> None:
    n = _check_gram(gram)
    _check_rows("gram", gram, n, valid, k)
    for name, x, shape, words in (
        ("inner", inner, (n,), f"(n,) with n = {n} as gram"), ("target_sq", target_sq, (), "()"),
    ):  # fmt: skip
        check_dtype(name, x, gram.dtype)
        check_shape(name, x, words, shape)
        check_same_device(name, x, "gram", gram)
    _check_double("draws", draws, (k, n), f"(k, n) with n = {n} as gram", "gram", gram)
    check_choice("weights", weights, WEIGHTS[:2])


def _cpu_diverse(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, draws: Tensor, k: int, weights: str, single: bool
) -> _Pair:
    indices, found = choices.choose_diverse(gram, inner, target_sq, valid, draws, k, weights)
    return indices, _as(found, single)


def _cuda_diverse(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, draws: Tensor, k: int, weights: str, single: bool
) -> _Pair:
    noise = choices.rounding_noise(gram.dtype)
    made = _choice_cuda.diverse(gram, inner, target_sq, valid, draws, k, weights, noise, single)
    return made if made is not None else _cpu_diverse(gram, inner, target_sq, valid, draws, k, weights, single)


def _as(weights: Tensor, single: bool) -> Tensor:
    return weights.float() if single else weights


def _pair_like(of: Tensor, k: int, single: bool) -> _Pair:
    return of.new_empty(k, dtype=torch.int64), of.new_empty(k, dtype=torch.float32 if single else F64)


choose_by_norm = define(
    "choose_by_norm(Tensor residual_sq, Tensor? feature_sq, Tensor valid, Tensor draws, Tensor tau, SymInt k, "
    "str weights, float momentum, float? threshold, bool single) -> (Tensor, Tensor, Tensor)",
    check=_check_norm,
    fake=lambda residual_sq, feature_sq, valid, draws, tau, k, *rest: (
        *_pair_like(residual_sq, k, rest[-1]), torch.empty_like(tau)
    ),
    cpu=_cpu_norm,
    cuda=_cuda_norm,
)  # fmt: skip
choose_by_percentile = define(
    "choose_by_percentile(Tensor loss, Tensor valid, Tensor history, Tensor draws, SymInt k, str weights, float power, "
    "float least, bool single) -> (Tensor, Tensor, Tensor)",
    check=_check_percentile,
    fake=lambda loss, valid, history, draws, k, *rest: (
        *_pair_like(loss, k, rest[-1]),
        torch.empty_like(history),
    ),
    cpu=_cpu_percentile,
    cuda=_cuda_percentile,
)
choose_balanced = define(
    "choose_balanced(Tensor gram, Tensor valid, Tensor mixture, Tensor draws, SymInt k, bool by_norm, bool single)"
    " -> (Tensor, Tensor)",
    check=_check_balanced,
    fake=lambda gram, valid, mixture, draws, k, by_norm, single: _pair_like(gram, k, single),
    cpu=_cpu_balanced,
    cuda=_cuda_balanced,
)
choose_diverse = define(
    "choose_diverse(Tensor gram, Tensor inner, Tensor target_sq, Tensor valid, Tensor draws, SymInt k, str weights, "
    "bool single) -> (Tensor, Tensor)",
    check=_check_diverse,
    fake=lambda gram, inner, target_sq, valid, draws, k, weights, single: _pair_like(gram, k, single),
    cpu=_cpu_diverse,
    cuda=_cuda_diverse,
)


def _with_memory_one_by_one(operator: Any, info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """``torch.vmap``'s rule: where the draws alone differ there is one thing to remember, which the rule may keep."""
    (indices, weights, memory), _ = _one_by_one(operator, info, dims, *arguments)
    draws_alone = all(dim is None for place, dim in enumerate(dims) if place != 3)
    return ((indices, weights, memory[0]), (0, 0, None)) if draws_alone else ((indices, weights, memory), (0, 0, 0))


for _name, _operator, _rule in (
    ("choose_by_norm", choose_by_norm, _with_memory_one_by_one),
    ("choose_by_percentile", choose_by_percentile, _with_memory_one_by_one),
    ("choose_balanced", choose_balanced, _one_by_one),
    ("choose_diverse", choose_diverse, _one_by_one),
):
    torch.library.register_vmap(f"selbp::{_name}", functools.partial(_rule, _operator), lib=library)
