"""A step's operators on the vectors of a minibatch. On a GPU each is one launch instead of torch's five to twelve.

On other devices the step calls torch's operators instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selbp._checks import check_dtype, check_floating, check_optional_tensor, check_same_device, check_shape
from selbp.ops import _backends
from selbp.ops._register import define, define_differentiable
from selbp.reference.losses import label_mass, scale_of

_Unscored = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
_LOW = (torch.float32, torch.bfloat16, torch.float16)


def _check_rows(name: str, x: Tensor, dtype: torch.dtype, of: str, like: Tensor) -> None:
    n = like.shape[0]
    check_dtype(name, x, dtype)
    check_shape(name, x, f"(n,) with n = {n} as {of}", (n,))
    check_same_device(name, x, of, like)


# ------------------------------------------------------------------------------------------ which rows are finite


def _check_finite(x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() < 1:
        raise TypeError(f"x must be a floating tensor (n, ...), got {x.dtype} {tuple(x.shape)}")


def plain_finite_rows(x: Tensor) -> Tensor:
    """As :data:`finite_rows`, in torch's operators."""
    n = x.shape[0]
    if not x.numel():
        return x.new_ones(n, dtype=torch.bool)
    return torch.isfinite(torch.linalg.vector_norm(x.reshape(n, -1), torch.inf, dim=1))


def _finite_cuda(x: Tensor) -> Tensor:
    fused = _backends.kernels(x) if x.dtype in _LOW and x.numel() else None
    found: Tensor = plain_finite_rows(x) if fused is None else fused.rows_are_finite(x.reshape(x.shape[0], -1))
    return found


# (n,) bool: every entry of x[i] is finite.
finite_rows = define(
    "finite_rows(Tensor x) -> Tensor",
    check=_check_finite,
    fake=lambda x: x.new_empty(x.shape[0], dtype=torch.bool),
    cpu=plain_finite_rows,
    cuda=_finite_cuda,
)


# ------------------------------------------------------------------------------------- what is known without a forward


def _check_unscored(target: Tensor, finite: Tensor, class_weight: Tensor | None, *_: Any) -> None:
    check_dtype("target", target, torch.int64)
    check_shape("target", target, "(n,)", (None,))
    _check_rows("finite", finite, torch.bool, "target", target)
    check_optional_tensor("class_weight", class_weight)
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        check_shape("class_weight", class_weight, "(C,)", (None,))
        check_same_device("class_weight", class_weight, "target", target)


def _unscored(
    target: Tensor, finite: Tensor, class_weight: Tensor | None, ignore_index: int, double: bool
) -> _Unscored:
    mass, present = label_mass(target, class_weight, ignore_index, torch.float64 if double else torch.float32)
    valid = present & finite
    unknown = torch.full_like(mass, torch.nan)
    return mass, valid, torch.zeros_like(valid), unknown, scale_of(mass, valid).to(unknown.dtype)


def _unscored_cuda(
    target: Tensor, finite: Tensor, class_weight: Tensor | None, ignore_index: int, double: bool
) -> _Unscored:
    fused = _backends.kernels(class_weight)
    if fused is None or double or target.shape[0] > fused.minibatch.MOST_ROWS:
        return _unscored(target, finite, class_weight, ignore_index, double)
    mass, valid, never, unknown, scale = fused.unscored(target, finite, class_weight, ignore_index)
    return mass, valid, never, unknown, scale


def _unscored_fake(
    target: Tensor, finite: Tensor, class_weight: Tensor | None, ignore_index: int, double: bool
) -> _Unscored:
    dtype = torch.float64 if double else torch.float32
    mass, unknown = (target.new_empty(target.shape, dtype=dtype) for _ in range(2))
    return mass, torch.empty_like(finite), torch.empty_like(finite), unknown, unknown.new_empty(())


# (n,) mass, (n,) valid, (n,) False, (n,) NaN, and () the unit of the mean over the valid rows; the numbers are float64
# where `double` says so.
unscored = define(
    "unscored(Tensor target, Tensor finite, Tensor? class_weight, SymInt ignore_index, bool double)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check_unscored,
    fake=_unscored_fake,
    cpu=_unscored,
    cuda=_unscored_cuda,
)


# ------------------------------------------------------------------------------------------------ how many are right


def _check_hits(logits: Tensor, target: Tensor, live: Tensor, ignore_index: int) -> None:
    check_floating("logits", logits)
    check_shape("logits", logits, "(n, C)", (None, None))
    if not logits.shape[1]:
        raise ValueError("logits must have at least one class, got C = 0")
    _check_rows("target", target, torch.int64, "logits", logits)
    _check_rows("live", live, torch.bool, "logits", logits)


def _hits(logits: Tensor, target: Tensor, live: Tensor, ignore_index: int) -> Tensor:
    present = (target != ignore_index) & live
    return torch.stack([(present & (logits.argmax(1) == target)).sum(), present.sum()])


def _hits_cuda(logits: Tensor, target: Tensor, live: Tensor, ignore_index: int) -> Tensor:
    fused = _backends.kernels(logits)
    if fused is None or logits.numel() > fused.minibatch.MOST_LOGITS:
        return _hits(logits, target, live, ignore_index)
    found: Tensor = fused.hits(logits, target, live, ignore_index)
    return found


# (2,) int64: how many live rows have their target as the arg max of their logits, and how many have a target.
count_hits = define(
    "count_hits(Tensor logits, Tensor target, Tensor live, SymInt ignore_index) -> Tensor",
    check=_check_hits,
    fake=lambda logits, target, live, ignore_index: target.new_empty(2),
    cpu=_hits,
    cuda=_hits_cuda,
)


# ----------------------------------------------------------------------------------------------- what is differentiated


def _check_loss(losses: Tensor, scale: Tensor, weights: Tensor) -> None:
    check_floating("losses", losses)
    check_shape("losses", losses, "(k,)", (None,))
    check_floating("scale", scale)
    check_shape("scale", scale, "()", ())
    check_same_device("scale", scale, "losses", losses)
    check_floating("weights", weights)
    check_shape("weights", weights, f"(k,) with k = {losses.shape[0]} as losses", (losses.shape[0],))
    check_same_device("weights", weights, "losses", losses)


def _loss(losses: Tensor, scale: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    scaled = losses * scale
    return torch.where(weights != 0, scaled * weights.to(scaled.dtype), 0).sum(), scaled


def _loss_cuda(losses: Tensor, scale: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    fused = _backends.kernels(losses) if losses.dtype == torch.float32 and losses.is_contiguous() else None
    if fused is None or len(losses) > fused.minibatch.MOST_ROWS:
        return _loss(losses, scale, weights)
    loss, scaled = fused.weighted_sum(losses, scale, weights)
    return loss, scaled


def _setup_loss(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[1:])


def _loss_backward(ctx: Any, needed: Sequence[bool], grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    scale, weights = ctx.saved_tensors
    return None if grad is None else (grad * scale.to(grad.dtype)) * weights.to(grad.dtype), None, None


# () sum_j w_j s l_j over the slots whose weight is not 0, of whose losses alone it has a gradient, and (k,) s l.
weighted_loss = define_differentiable(
    "weighted_loss(Tensor losses, Tensor scale, Tensor weights) -> (Tensor, Tensor)",
    check=_check_loss,
    fake=lambda losses, scale, weights: (losses.new_empty(()), torch.empty_like(losses)),
    cpu=_loss,
    cuda=_loss_cuda,
    setup_context=_setup_loss,
    backward=_loss_backward,
    composed=lambda _, *inputs: _loss(*inputs),
)
