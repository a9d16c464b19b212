"""Argument checks that the operators share.

Those of tensors read metadata only (dtype, shape, device), so they hold for FakeTensors, under ``torch.compile`` and
without a synchronisation. Each error names the argument, what it must be and what came.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = sys.float_info.max
_INT64 = 1 << 63


def check_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_optional_tensor(name: str, value: object) -> None:
    """TypeError unless ``value`` is a tensor or None."""
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor or None, got {type(value).__name__}")


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless ``tensor`` is a float32, float64, bfloat16 or float16 tensor."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {_dtype(tensor.dtype)}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """TypeError unless ``tensor`` is of ``dtype``."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {_dtype(dtype)}, got {_dtype(tensor.dtype)}")


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
        raise TypeError(
            f"{name} must have the dtype of {other_name}, {_dtype(other.dtype)}, got {_dtype(tensor.dtype)}"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_range(name: str, value: float, low: float = -LARGEST, high: float = LARGEST) -> None:
    """ValueError unless ``value`` is finite and lies in [low, high]; by comparisons: ``value`` may be symbolic."""
    if not low <= value <= high:
        limits = f"in [{low:g}, {high:g}]" if high < LARGEST else f"at least {low:g} and finite"
        raise ValueError(f"{name} must be {limits}, got {value}")


def number(name: str, value: object) -> float:
    """``value`` as a float: Python's and numpy's numbers, symbolic ones as they are; TypeError for anything else."""
    if isinstance(value, float):  # np.float64 is one
        return value
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def integer(name: str, value: object) -> int:
    """``value`` as an int: Python's and numpy's, symbolic ones as they are; TypeError for anything else."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not isinstance(value, int):
        value = int(value)
    if not -_INT64 <= value < _INT64:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return value


def flag(name: str, value: object) -> bool:
    """``value`` as a bool: Python's and numpy's; TypeError for anything else."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {type(value).__name__}")


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast would cast a product of ``tensor``."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operator accumulates in and returns for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
