"""What a step reads of a minibatch's logits, at once: statistics, the unit of its mean, and the gradients' factors.

On a GPU two launches (``triton_kernels/stored_rows.py``) where the operators one by one, and torch's between them, take
twenty; elsewhere those operators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from selbp._checks import accumulate_dtype
from selbp.ops import _backends
from selbp.ops import statistics as statistics_operator
from selbp.ops._loss_options import LossOptions
from selbp.ops._register import define
from selbp.ops.residual import residual
from selbp.reference.losses import label_mass, scale_of
from selbp.types import BatchStatistics

_Outputs = tuple[Tensor, ...]


class ScoredMinibatch(NamedTuple):
    """The statistics of n rows, ``residual_sq`` in the unit of the minibatch's mean, and what is summed over them."""

    stats: BatchStatistics
    mass: Tensor  # (n,) what each row counts in the mean: its target's class weight, 0 where that is ignored
    scaled: Tensor  # (n,) the loss in that unit
    scale: Tensor  # () the unit, n / (sum of the valid rows' masses), 0 where there is none
    hits: Tensor  # (2,) int64: how many rows are correct, and valid
    residual: Tensor | None  # (n, C) in that unit, 0 in rows that are not valid
    features: Tensor | None  # (n, d) of the losses' dtype, 0 in rows that are not valid


def score_minibatch(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None,  # (n, d)
    *,
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    bias: bool,
    factors: bool,  # whether residual and features are wanted; only with features
) -> ScoredMinibatch:
    """:func:`cross_entropy_statistics` of a minibatch, in the unit of its mean, and the factors of its gradients."""
    factors = factors and features is not None
    found = _score_minibatch(logits, target, features, class_weight, ignore_index, label_smoothing, 0.0, bias, factors)
    return ScoredMinibatch(BatchStatistics(*found[:6]), *found[6:10], *(found[10:] if factors else (None, None)))


def _pack(logits: Tensor, target: Tensor, features: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return logits, target, features, LossOptions._make(rest[:4]), *rest[4:]


def _check(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: bool
) -> None:
    statistics_operator._check(logits, target, features, options, bias)
    if factors and features is None:
        raise ValueError("features must be given for factors=True, got None")


def _fake(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: bool
) -> _Outputs:
    dtype = accumulate_dtype(logits.dtype)
    stats = statistics_operator._fake(logits, target, features, options, bias)
    n = logits.shape[0]
    mass, scaled, scale = (logits.new_empty(shape, dtype=dtype) for shape in ((n,), (n,), ()))
    shapes = (logits.shape, features.shape) if factors and features is not None else ((0, 0), (0, 0))
    return *stats, mass, scaled, scale, target.new_empty(2), *(logits.new_empty(shape, dtype=dtype) for shape in shapes)


def _composed(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: bool
) -> _Outputs:
    dtype, named = accumulate_dtype(logits.dtype), options._asdict()
    stats = statistics_operator.cross_entropy_statistics(logits, target, features, bias=bias, **named)
    mass, _ = label_mass(target, options.class_weight, options.ignore_index, dtype)
    scale = scale_of(mass, stats.valid).to(dtype)
    both = [logits.new_empty(0, 0, dtype=dtype) for _ in range(2)]
    if factors and features is not None:
        dead = ~stats.valid[:, None]
        both = [residual(logits, target, stats.lse, **named) * scale, features.to(dtype, copy=True)]
        both = [x.masked_fill_(dead, 0.0) for x in both]
    hits = torch.stack([stats.correct.sum(), stats.valid.sum()])
    scaled = stats._replace(residual_sq=stats.residual_sq * scale.square())
    return *scaled, mass, stats.loss * scale, scale, hits, *both


def _cuda(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: bool
) -> _Outputs:
    fused = _backends.kernels(logits, features)
    if fused is not None and fused.fits_minibatch(logits):
        outputs: _Outputs = fused.score_minibatch(logits, target, features, options, bias, factors)
        return outputs
    return _composed(logits, target, features, options, bias, factors)


_score_minibatch = define(
    "score_minibatch(Tensor logits, Tensor target, Tensor? features, Tensor? class_weight, SymInt ignore_index, "
    "float label_smoothing, float softcap, bool bias, bool factors) -> "
    f"({', '.join(['Tensor'] * 12)})",
    check=_check,
    fake=_fake,
    cpu=_composed,
    cuda=_cuda,
    pack=_pack,
)
