"""What a step reads of a minibatch's logits, at once: statistics, the unit of its mean, and the gradients' factors.

On a GPU two launches (``triton_kernels/stored_rows.py``) where the operators one by one, and torch's between them, take
twenty; on a CPU one native call: there the calls take longer than the sums of a small minibatch.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import accumulate_dtype, check_choice
from selbp.ops import _backends
from selbp.ops import statistics as statistics_operator
from selbp.ops._backends import native_threads
from selbp.ops._logit_pass import (
    TYPE_CODE,
    address,
    contiguous_rows,
    empty_statistics,
    native_options,
    weight_sum,
)
from selbp.ops._loss_options import LossOptions, raise_bad_target
from selbp.ops._register import define
from selbp.ops.residual import residual
from selbp.reference.losses import label_mass, scale_of
from selbp.types import BatchStatistics

FACTORS = ("none", "residual", "both")  # of the gradients, that are wanted
_Outputs = tuple[Tensor, ...]


class ScoredMinibatch(NamedTuple):
    """The statistics of n rows, ``residual_sq`` in the unit of the minibatch's mean, and what is summed over them."""

    stats: BatchStatistics
    mass: Tensor  # (n,) what each row counts in the mean: its target's class weight, 0 where that is ignored
    scaled: Tensor  # (n,) the loss in that unit
    scale: Tensor  # () the unit, n / (sum of the valid rows' masses), 0 where there is none
    hits: Tensor  # (2,) int64: how many rows are correct, and valid
    residual: Tensor | None  # (n, C) in that unit, 0 in rows that are not valid; where it is wanted
    features: Tensor | None  # (n, d) of the losses' dtype, 0 in rows that are not valid; where both are wanted


def score_minibatch(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,) int64
    features: Tensor | None,  # (n, d)
    *,
    class_weight: Tensor | None,  # (C,)
    ignore_index: int,
    label_smoothing: float,
    bias: bool,
    factors: str,  # one of FACTORS; "none" without features
) -> ScoredMinibatch:
    """:func:`cross_entropy_statistics` of a minibatch, in the unit of its mean, and the factors of its gradients."""
    factors = "none" if features is None else factors
    found = _score_minibatch(logits, target, features, class_weight, ignore_index, label_smoothing, 0.0, bias, factors)
    mass, scaled, scale, hits, left, right = found[6:]
    return ScoredMinibatch(
        BatchStatistics(*found[:6]),
        mass,
        scaled,
        scale,
        hits,
        None if factors == "none" else left,
        right if factors == "both" else None,
    )


def _pack(logits: Tensor, target: Tensor, features: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return logits, target, features, LossOptions._make(rest[:4]), *rest[4:]


def _check(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: str
) -> None:
    statistics_operator._check(logits, target, features, options, bias)
    check_choice("factors", factors, FACTORS)
    if factors == "both" and features is None:
        raise ValueError("features must be given for factors='both', got None")


def _fake(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: str
) -> _Outputs:
    dtype = accumulate_dtype(logits.dtype)
    stats = statistics_operator._fake(logits, target, features, options, bias)
    n = logits.shape[0]
    mass, scaled, scale = (logits.new_empty(shape, dtype=dtype) for shape in ((n,), (n,), ()))
    r = logits.new_empty((0, 0) if factors == "none" else logits.shape, dtype=dtype)
    h = logits.new_empty(features.shape if factors == "both" and features is not None else (0, 0), dtype=dtype)
    return *stats, mass, scaled, scale, target.new_empty(2), r, h


def _cpu(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: str
) -> _Outputs:
    (n, n_classes), dtype = logits.shape, accumulate_dtype(logits.dtype)
    z, y, options = contiguous_rows(logits), target.contiguous(), native_options(options, dtype)
    h = None if features is None else contiguous_rows(features)
    # One kind of allocation: after a forward each kind of call takes 30 us once, until its code is in the cache.
    empty = partial(z.new_empty, dtype=dtype)
    stats = empty_statistics(z, n, dtype)
    mass, scaled, scale, hits = empty(n), empty(n), empty(()), z.new_empty(2, dtype=torch.int64)
    r = empty((0, 0) if factors == "none" else (n, n_classes))
    class_weight, ignore_index, label_smoothing, softcap = options
    bad = _native.score_minibatch(
        z.data_ptr(),
        TYPE_CODE[z.dtype],
        z.stride(0),
        n,
        n_classes,
        0 if h is None else h.data_ptr() or y.data_ptr(),  # of width 0 it has no address: any serves
        0 if h is None else TYPE_CODE[h.dtype],
        0 if h is None else h.stride(0),
        0 if h is None else h.shape[1],
        bias,
        y.data_ptr(),
        address(class_weight),
        ignore_index,
        label_smoothing,
        softcap,
        weight_sum(options, n_classes),
        (
            *(x.data_ptr() for x in stats),
            mass.data_ptr(),
            scaled.data_ptr(),
            scale.data_ptr(),
            hits.data_ptr(),
            0 if factors == "none" else r.data_ptr(),
        ),
        native_threads(n * n_classes),
    )
    if bad >= 0:
        raise_bad_target(y, bad, n_classes, ignore_index)
    kept = empty((0, 0))
    if factors == "both" and features is not None:
        kept = features.to(dtype, copy=True).masked_fill_(~stats[5][:, None], 0.0)
    return *stats, mass, scaled, scale, hits, r, kept


def _composed(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: str
) -> _Outputs:
    dtype, named = accumulate_dtype(logits.dtype), options._asdict()
    stats = statistics_operator.cross_entropy_statistics(logits, target, features, bias=bias, **named)
    mass, _ = label_mass(target, options.class_weight, options.ignore_index, dtype)
    scale = scale_of(mass, stats.valid).to(dtype)
    dead = ~stats.valid[:, None]
    r, h = (logits.new_empty(0, 0, dtype=dtype) for _ in range(2))
    if factors != "none":
        r = (residual(logits, target, stats.lse, **named) * scale).masked_fill_(dead, 0.0)
    if factors == "both" and features is not None:
        h = features.to(dtype, copy=True).masked_fill_(dead, 0.0)
    hits = torch.stack([stats.correct.sum(), stats.valid.sum()])
    scaled = stats._replace(residual_sq=stats.residual_sq * scale.square())
    return *scaled, mass, stats.loss * scale, scale, hits, r, h


def _cuda(
    logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool, factors: str
) -> _Outputs:
    fused = _backends.kernels(logits, features)
    if factors != "residual" and fused is not None and fused.fits_minibatch(logits):
        outputs: _Outputs = fused.score_minibatch(logits, target, features, options, bias, factors == "both")
        return outputs
    return _composed(logits, target, features, options, bias, factors)


_score_minibatch = define(
    "score_minibatch(Tensor logits, Tensor target, Tensor? features, Tensor? class_weight, SymInt ignore_index, "
    "float label_smoothing, float softcap, bool bias, str factors) -> "
    f"({', '.join(['Tensor'] * 12)})",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    pack=_pack,
)
