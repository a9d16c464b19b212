"""Checks of plain arguments. Each error names the argument, what was expected and what came.

numpy's scalars are taken for numbers and flags as Python's are. A bool is never a number here, nor is a tensor.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from selbp._numpy import ARRAYS, BOOLS


def shown(value: Any) -> str:
    """How a message shows what came: a tensor's dtype and shape, which wait for no device; else a short ``repr``."""
    if isinstance(value, Tensor) or isinstance(value, ARRAYS):
        return f"a {type(value).__name__} {value.dtype} {tuple(value.shape)}".replace("torch.", "")
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float. Raises TypeError or ValueError unless it is a finite number in [low, high]."""
    if isinstance(value, BOOLS) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    number = float(value)
    if not (math.isfinite(number) and low <= number <= high):
        limits = f" and at least {low:g}" if high == math.inf else f" and lie in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite{limits}, got {value}")
    return number


def check_int(name: str, value: object, low: int | None = None, meaning: str = "an int") -> int:
    """``value`` as an int. Raises TypeError or ValueError unless it is an integer of at least ``low``."""
    if isinstance(value, BOOLS) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {meaning}, got {shown(value)}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool. Raises TypeError for anything else."""
    if not isinstance(value, BOOLS):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_generator(generator: object, device: torch.device | None = None) -> None:
    """Raise TypeError or ValueError unless ``generator`` is None or a generator on ``device``'s kind of device."""
    if generator is None:
        return
    place = getattr(generator, "device", None)
    if device is not None and isinstance(place, torch.device) and place.type != device.type:
        raise ValueError(f"generator must be on the statistics' device {device}, got one on {place}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")
