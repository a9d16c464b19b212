"""Argument checks that the operators share.

They read metadata only (dtype, shape, device), so they hold for FakeTensors, under ``torch.compile`` and without a
synchronisation. Each error names the argument, what it must be and what came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless ``tensor`` is a float32, float64, bfloat16 or float16 tensor."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")


def check_integer(name: str, tensor: Tensor, dtype: torch.dtype = torch.int64) -> None:
    """TypeError unless ``tensor`` is a tensor of the integer type ``dtype``."""
    check_tensor(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: str, sizes: Sequence[int | None]) -> None:
    """ValueError unless ``tensor`` has the sizes ``sizes`` (None: any); ``expected`` is how a reader writes them."""
    shape = tensor.shape
    fits = len(shape) == len(sizes)
    if fits:
        for axis, size in enumerate(sizes):  # a plain loop costs half of any() over a generator
            if size is not None and shape[axis] != size:
                fits = False
    if not fits:
        raise ValueError(f"{name} must be {expected}, got {tuple(shape)}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """TypeError unless both tensors have one dtype."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_finite(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """ValueError unless the Python number ``value`` is finite and lies in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and low <= value <= high):
        limits = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"at least {low:g} and finite"
        raise ValueError(f"{name} must be {limits}, got {value}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operator accumulates in and returns for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
