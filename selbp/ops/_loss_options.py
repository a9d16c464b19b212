"""The options of the cross-entropy, and the checks of what every operator around it takes."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from selbp._checks import (
    check_dtype,
    check_floating,
    check_optional_tensor,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
    symbolic_float,
    symbolic_int,
)


class LossOptions(NamedTuple):
    """What the operators of one loss share. The public functions and the schemas take the four fields one by one."""

    class_weight: Tensor | None = None  # (C,)
    ignore_index: int = -100
    label_smoothing: float = 0.0
    softcap: float = 0.0

    @classmethod
    def of(
        cls, class_weight: Tensor | None, ignore_index: object, label_smoothing: object, softcap: object
    ) -> LossOptions:
        """The options that a caller gave. Raises TypeError for what is no tensor or no number."""
        check_optional_tensor("class_weight", class_weight)
        return cls(
            class_weight,
            symbolic_int("ignore_index", ignore_index),
            symbolic_float("label_smoothing", label_smoothing),
            symbolic_float("softcap", softcap),
        )


def check_loss(
    rows_name: str,  # the argument whose rows are the samples
    rows: Tensor,  # (n, ...)
    n_classes: int,
    target: Tensor,  # (n,)
    options: LossOptions,
) -> None:
    """Raise unless target and options fit ``n = len(rows)`` samples of ``n_classes`` classes."""
    if n_classes < 1:
        raise ValueError("logits must have at least one class, got C = 0")
    check_dtype("target", target, torch.int64)
    check_shape("target", target, f"(n,) with n = {rows.shape[0]} as {rows_name}", (rows.shape[0],))
    check_same_device("target", target, rows_name, rows)
    class_weight = options.class_weight
    if class_weight is not None:
        check_floating("class_weight", class_weight)
        check_shape("class_weight", class_weight, f"(C,) with C = {n_classes} classes", (n_classes,))
        check_same_device("class_weight", class_weight, rows_name, rows)
    check_range("label_smoothing", options.label_smoothing, 0.0, 1.0)
    check_range("softcap", options.softcap, 0.0)


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
    """Cast a head's operands to autocast's dtype, as ``torch.nn.functional.linear`` does: float64 stays."""
    dtype = torch.get_autocast_dtype(features.device.type)

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    return cast(features), cast(weight), bias if bias is None else cast(bias), *others


def raise_bad_target(target: Tensor, row: int, n_classes: int, ignore_index: int) -> NoReturn:
    """Raise the ValueError for a target outside [0, C) that a native kernel found in ``row``."""
    raise ValueError(
        f"target must lie in [0, {n_classes}) or be ignore_index = {ignore_index}, got {int(target[row])} in row {row}"
    )
