"""What the operators around the cross-entropy share: argument checks, native type codes, raw addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp._checks import (
    check_dtype,
    check_floating,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
    integer,
    number,
)

Options = tuple[int, float, float]  # ignore_index, label_smoothing, softcap

TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/statistics/cpu.hpp


def loss_options(ignore_index: object, label_smoothing: object, softcap: object) -> Options:
    """The options as the operators take them; TypeError for what is no number."""
    return (
        integer("ignore_index", ignore_index),
        number("label_smoothing", label_smoothing),
        number("softcap", softcap),
    )


def check_loss(
    rows_name: str,  # the argument whose rows are the samples
    rows: Tensor,  # (n, ...)
    n_classes: int,
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (C,)
    label_smoothing: float,
    softcap: float,
) -> None:
    """Raise unless target and options fit ``n = len(rows)`` samples of ``n_classes`` classes."""
    if n_classes < 1:
        raise ValueError("logits must have at least one class, got C = 0")
    check_dtype("target", target, torch.int64)
    check_shape("target", target, f"(n,) with n = {rows.shape[0]} as {rows_name}", (rows.shape[0],))
    check_same_device("target", target, rows_name, rows)
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        check_shape("class_weight", class_weight, f"(C,) with C = {n_classes} classes", (n_classes,))
        check_same_device("class_weight", class_weight, rows_name, rows)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("softcap", softcap, 0.0)


def check_head(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless features (n, d), weight (C, d) and bias (C,) or None are floating, of one dtype and device."""
    check_floating("features", features)
    check_shape("features", features, "(n, d)", (None, None))
    check_floating("weight", weight)
    check_shape("weight", weight, f"(C, d) with d = {features.shape[1]} as features", (None, features.shape[1]))
    heads = [("weight", weight)]
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, f"(C,) with C = {weight.shape[0]} rows as weight", (weight.shape[0],))
        heads.append(("bias", bias))
    for name, tensor in heads:
        check_same_dtype(name, tensor, "features", features)
        check_same_device(name, tensor, "features", features)


def autocast_head(
    features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor | Any | None, ...]:
    """A head's operands in autocast's dtype, as ``torch.nn.functional.linear`` casts them: float64 stays."""
    dtype = torch.get_autocast_dtype(features.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(features), cast(weight), bias if bias is None else cast(bias), *others


def contiguous_rows(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def native_class_weight(class_weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The class weights in the dtype that the kernels compute in, contiguous."""
    return None if class_weight is None else class_weight.to(dtype).contiguous()


def weight_sum(class_weight: Tensor | None, n_classes: int, label_smoothing: float) -> float:
    """Sum of the class weights, which only label smoothing reads; ``n_classes`` where there are none."""
    if class_weight is None or not label_smoothing:
        return float(n_classes)
    return float(class_weight.sum(dtype=torch.float64))


def address(tensor: Tensor | None) -> int:
    """Where the data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def raise_bad_target(target: Tensor, row: int, n_classes: int, ignore_index: int) -> None:
    """The ValueError for a target outside [0, C) that a native kernel found in ``row``."""
    raise ValueError(
        f"target must lie in [0, {n_classes}) or be ignore_index = {ignore_index}, got {int(target[row])} in row {row}"
    )
