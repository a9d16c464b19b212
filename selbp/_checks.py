"""Every check of arguments that the package shares.

Each error names the argument, says what it must be, and shows what came. Checks of tensors read metadata only (dtype,
shape, device): they hold for FakeTensors and under ``torch.compile``, and never wait for a device. Numbers may be
Python's, numpy's, or symbolic, which stay symbolic. A bool is never a number here, nor is a tensor.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from selbp._numpy import ARRAYS, BOOLS

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


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def check_entries(what: str, state: object, names: Iterable[str]) -> None:
    """Raise ValueError unless ``state`` is a mapping with exactly the entries ``names``; ``what`` is its name."""
    expected = set(names)
    if not isinstance(state, Mapping) or set(state) != expected:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{what} must have the entries {sorted(expected)}, got {got}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, an entry of ``what`` that is missing or of another kind is a ValueError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"{what} does not read: {error!r}") from error


def check_generator(generator: object, device: torch.device | None = None) -> None:
    """Raise TypeError or ValueError unless ``generator`` is None or a generator on ``device``'s kind of device."""
    if generator is None:
        return
    place = getattr(generator, "device", None)
    if device is not None and isinstance(place, torch.device) and place.type != device.type:
        raise ValueError(f"generator must be on the statistics' device {device}, got one on {place}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {shown(generator)}")


def symbolic_float(name: str, value: object) -> float:
    """``value`` as a float; a symbolic number stays symbolic. Raises TypeError for anything else."""
    if isinstance(value, float):  # np.float64 is one
        return value
    if isinstance(value, torch.SymFloat):
        return value  # type: ignore[return-value]
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    return float(value)


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> float:
    """``value`` as a float. Raises TypeError or ValueError unless it is a finite number in [low, high]."""
    found = symbolic_float(name, value)
    if not (math.isfinite(found) and low <= found <= high):
        limits = f" and at least {low:g}" if high == math.inf else f" and lie in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be finite{limits}, got {value}")
    return found


def check_int(name: str, value: object, low: int | None = None, meaning: str = "an int") -> int:
    """``value`` as an int. Raises TypeError, or ValueError below ``low``; ``meaning`` says what it must be."""
    if isinstance(value, BOOLS) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {meaning}, got {shown(value)}")
    if low is not None and value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def symbolic_int(name: str, value: object) -> int:
    """``value`` as an int of 64 bits; a symbolic one stays symbolic. Raises TypeError or ValueError."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    found = check_int(name, value)
    if not -_INT64 <= found < _INT64:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")
    return found


def check_flag(name: str, value: object) -> bool:
    """``value`` as a bool: Python's or numpy's. Raises TypeError for anything else."""
    if not isinstance(value, BOOLS):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def shown(value: Any) -> str:
    """How a message shows what came: a tensor's dtype and shape, which wait for no device; else a short ``repr``."""
    if isinstance(value, Tensor) or isinstance(value, ARRAYS):
        return f"a {type(value).__name__} {value.dtype} {tuple(value.shape)}".replace("torch.", "")
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast would cast a product of ``tensor``."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What an operator accumulates in and returns for inputs of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
