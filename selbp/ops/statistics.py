"""``cross_entropy_statistics`` and its linear form: what the forward pass knows about each sample, nearly for free.

One pass over a row of logits gives its loss, log-sum-exp, the squared norm of the loss's gradient and whether the
target leads. The linear form never stores the logits: the BLAS writes a tile of rows x classes, a native kernel
(csrc/statistics) folds it into nine numbers a row, and the tile is reused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import (
    accumulate_dtype,
    check_flag,
    check_floating,
    check_optional_tensor,
    check_same_device,
    check_shape,
    check_tensor,
)
from selbp.ops import _backends
from selbp.ops._logit_pass import LogitPass, Statistics, contiguous_rows, empty_statistics
from selbp.ops._loss_options import LossOptions, autocast_head, check_head, check_loss
from selbp.ops._register import define
from selbp.types import BatchStatistics


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,)
    features: Tensor | None = None,  # (n, d)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    bias: bool = True,
) -> BatchStatistics:
    """Loss, gradient norms and correctness of each of n rows of logits.

    Parameters
    ----------
    logits : Tensor
        (n, C), float32, float64, bfloat16 or float16; copied once if its last dimension is not contiguous.
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    features : Tensor or None
        (n, d) input of the head that made the logits; without it ``feature_sq`` is 1.
    class_weight : Tensor or None
        (C,) weights of the classes, as torch's ``weight``.
    ignore_index : int
        Rows with this target have loss 0, norm 0, and are not valid.
    label_smoothing : float
        In [0, 1], as torch's.
    softcap : float
        Where positive, the loss is that of ``softcap * tanh(logits / softcap)``.
    bias : bool
        Whether the head has a bias, whose input 1 then counts in ``feature_sq``.

    Returns
    -------
    BatchStatistics
        float64 for float64 logits, else float32, accumulated in float32 or better. The target's logit is held apart, so
        confident rows keep their relative accuracy (1 - p_y down to 1e-9 and beyond, where torch's own float32 loss
        returns 0). Losses are those of torch's ``reduction="none"``. A row with a NaN, with an infinite logit or with
        an infinite loss is flagged by ``valid`` and spoils no other; -inf on a class that the loss does not weigh is a
        legal mask.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    See Also
    --------
    selbp.ops.linear_cross_entropy_statistics : the same of a head's input and weight; stores no logits.
    selbp.ops.residual : the gradients with respect to the logits.
    selbp.BatchStatistics : what is returned.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> target = torch.tensor([0, 1])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target)
    >>> stats.loss
    tensor([0.2395, 3.0949])
    >>> stats.correct
    tensor([ True, False])
    """
    check_tensor("logits", logits)
    check_tensor("target", target)
    check_optional_tensor("features", features)
    options = LossOptions.of(class_weight, ignore_index, label_smoothing, softcap)
    return BatchStatistics(*_cross_entropy_statistics(logits, target, features, *options, check_flag("bias", bias)))


def linear_cross_entropy_statistics(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> BatchStatistics:
    """:func:`cross_entropy_statistics` of ``features @ weight.T + bias``, which is never stored.

    Holds one tile of logits of a few MiB, whatever C. Under bfloat16 or float16 the tile has that dtype, as an eager
    linear layer's output would.

    Parameters
    ----------
    features : Tensor
        (n, d), float32, float64, bfloat16 or float16.
    weight : Tensor
        (C, d) of the dtype of ``features``.
    bias : Tensor or None
        (C,) of that dtype.
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    class_weight, ignore_index, label_smoothing, softcap
        As in :func:`cross_entropy_statistics`.

    Returns
    -------
    BatchStatistics
        ``feature_sq`` includes the bias's 1 where there is a bias.

    Raises
    ------
    TypeError
        An argument has the wrong type, or the dtypes differ.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    See Also
    --------
    selbp.ops.linear_cross_entropy : returns these statistics beside a loss that has a gradient.
    selbp.ops.cross_entropy_statistics : the same of logits.

    Examples
    --------
    >>> import torch, selbp
    >>> features, weight, target = torch.ones(2, 4), torch.zeros(3, 4), torch.tensor([0, 1])
    >>> selbp.ops.linear_cross_entropy_statistics(features, weight, None, target).loss  # log 3
    tensor([1.0986, 1.0986])
    """
    check_tensor("features", features)
    check_tensor("weight", weight)
    check_optional_tensor("bias", bias)
    check_tensor("target", target)
    options = LossOptions.of(class_weight, ignore_index, label_smoothing, softcap)
    return BatchStatistics(*_linear_cross_entropy_statistics(features, weight, bias, target, *options))


def _pack(logits: Tensor, target: Tensor, features: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return logits, target, features, LossOptions._make(rest[:4]), rest[4]


def _check(logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool) -> None:
    check_floating("logits", logits)
    check_shape("logits", logits, "(n, C)", (None, None))
    check_loss("logits", logits, logits.shape[1], target, options)
    if features is not None:
        check_floating("features", features)
        check_shape("features", features, f"(n, d) with n = {logits.shape[0]} as logits", (logits.shape[0], None))
        check_same_device("features", features, "logits", logits)


def _fake(logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool) -> Statistics:
    return empty_statistics(logits, logits.shape[0], accumulate_dtype(logits.dtype))


def _cpu(logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool) -> Statistics:
    logit_pass = LogitPass(logits.shape[1], logits.dtype, target, features, bias, options)
    logit_pass.add(contiguous_rows(logits))
    return logit_pass.outputs


def _cuda(logits: Tensor, target: Tensor, features: Tensor | None, options: LossOptions, bias: bool) -> Statistics:
    fused = _backends.kernels(logits, features)
    if fused is not None:
        return fused.cross_entropy_statistics(logits, target, features, options, bias)
    dtype = accumulate_dtype(logits.dtype)
    wide = None if features is None else features.to(dtype)
    return reference.cross_entropy_statistics(logits.to(dtype), target, wide, bias=bias, **options._asdict())


def _linear_pack(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *options: Any
) -> tuple[Any, ...]:
    return features, weight, bias, target, LossOptions._make(options)


def _linear_check(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions) -> None:
    check_head(features, weight, bias)
    check_loss("features", features, weight.shape[0], target, options)


def _linear_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
) -> Statistics:
    return empty_statistics(features, features.shape[0], accumulate_dtype(features.dtype))


def _linear_cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
) -> Statistics:
    logit_pass = LogitPass(weight.shape[0], features.dtype, target, features, bias is not None, options)
    logit_pass.add_head(features, weight, bias)
    return logit_pass.outputs


def _linear_cuda(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: LossOptions
) -> Statistics:
    fused = _backends.kernels(features)
    if fused is not None:
        return fused.linear_cross_entropy_statistics(features, weight, bias, target, options)
    logits = torch.nn.functional.linear(features, weight, bias)
    return _cuda(logits, target, features, options, bias is not None)


_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # the fields of BatchStatistics, in order

_cross_entropy_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor target, Tensor? features, Tensor? class_weight, "
    f"SymInt ignore_index, float label_smoothing, float softcap, bool bias) -> {_OUTPUTS}",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    pack=_pack,
)
_linear_cross_entropy_statistics = define(
    "linear_cross_entropy_statistics(Tensor features, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? class_weight, SymInt ignore_index, float label_smoothing, float softcap) -> {_OUTPUTS}",
    check=_linear_check,
    fake=_linear_fake,
    cpu=_linear_cpu,
    cuda=_linear_cuda,
    pack=_linear_pack,
    autocast=autocast_head,
)
