"""``residual``: the gradient of each row's loss with respect to its logits, softmax minus target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype, check_floating, check_same_device, check_shape, check_tensor
from selbp.ops import _backends
from selbp.ops._factors import contiguous_in
from selbp.ops._logit_pass import (
    ResidualClasses,
    ResidualRows,
    contiguous_rows,
    native_options,
    residual_tile,
    weight_sum,
)
from selbp.ops._loss_options import LossOptions, check_loss
from selbp.ops._register import define


def residual(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,)
    lse: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Gradient of each row's loss with respect to its logits (before the cap, whose chain factor is included).

    Parameters
    ----------
    logits : Tensor
        (n, C), float32, float64, bfloat16 or float16; copied once if its last dimension is not contiguous.
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    lse : Tensor
        (n,) log-sum-exp of the capped logits, as :func:`cross_entropy_statistics` returns it.
    class_weight : Tensor or None
        (C,) weights of the classes, as torch's ``weight``.
    ignore_index : int
        Rows with this target are 0.
    label_smoothing : float
        In [0, 1], as torch's.
    softcap : float
        As in :func:`cross_entropy_statistics`.

    Returns
    -------
    Tensor
        (n, C), float64 for float64 logits, else float32; 0 in rows whose target is ignored or whose loss is not finite.
        The target's entry is minus the sum of the others' probabilities: ``p_y - 1`` would cancel.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    See Also
    --------
    selbp.ops.cross_entropy_statistics : gives the ``lse``.
    selbp.ops.gradient_gram : what the residuals are factors of.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> target = torch.tensor([0, 1])
    >>> lse = selbp.ops.cross_entropy_statistics(logits, target).lse
    >>> selbp.ops.residual(logits, target, lse)  # softmax, minus 1 at the target
    tensor([[-0.2130,  0.1065,  0.1065],
            [ 0.0453, -0.9547,  0.9094]])
    """
    check_tensor("logits", logits)
    check_tensor("target", target)
    check_tensor("lse", lse)
    return _residual(logits, target, lse, *LossOptions.of(class_weight, ignore_index, label_smoothing, softcap))


def _pack(logits: Tensor, target: Tensor, lse: Tensor, *options: Any) -> tuple[Any, ...]:
    return logits, target, lse, LossOptions(*options)


def _check(logits: Tensor, target: Tensor, lse: Tensor, options: LossOptions) -> None:
    check_floating("logits", logits)
    check_shape("logits", logits, "(n, C)", (None, None))
    check_loss("logits", logits, logits.shape[1], target, options)
    check_floating("lse", lse)
    check_shape("lse", lse, f"(n,) with n = {logits.shape[0]} as logits", (logits.shape[0],))
    check_same_device("lse", lse, "logits", logits)


def _fake(logits: Tensor, target: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulate_dtype(logits.dtype))


def _cpu(logits: Tensor, target: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    dtype = accumulate_dtype(logits.dtype)
    n, n_classes = logits.shape
    out = torch.empty(n, n_classes, dtype=dtype, device="cpu")
    if not n:
        return out
    options = native_options(options, dtype)
    rows = ResidualRows(target.contiguous(), contiguous_in(lse, dtype))
    classes = ResidualClasses(0, n_classes, weight_sum(options, n_classes))
    return residual_tile(out, contiguous_rows(logits), rows, classes, options)


def _cuda(logits: Tensor, target: Tensor, lse: Tensor, options: LossOptions) -> Tensor:
    fused = _backends.kernels(logits)
    if fused is not None:
        return fused.residual(logits, target, lse, options)
    dtype = accumulate_dtype(logits.dtype)
    return reference.residual(logits.to(dtype), target, lse.to(dtype), **options._asdict())


_residual = define(
    "residual(Tensor logits, Tensor target, Tensor lse, Tensor? class_weight, SymInt ignore_index, "
    "float label_smoothing, float softcap) -> Tensor",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    pack=_pack,
)
