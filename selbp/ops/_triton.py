"""Whether CUDA tensors run on the Triton kernels, and why not where they do not.

Triton is optional and imported on the first CUDA call, never with selbp. Where it is missing or too old, or where a
tensor is float64 (the kernels accumulate in float32), the reference implementation runs: correct, without a
synchronisation. A Triton that is missing or too old is warned of once, for the kernels are what a GPU is there for.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from types import ModuleType

import torch
from torch import Tensor

OLDEST = (3, 4)  # the first with tensor descriptors
INSTEAD = (
    "CUDA tensors use the reference implementation, which is correct and slower: "
    f"pip install 'triton>={OLDEST[0]}.{OLDEST[1]}', which torch 2.8 and newer bring"
)


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot be used in this process; None where they can."""
    needed = f"{OLDEST[0]}.{OLDEST[1]} or newer is needed"
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is missing ({error}), {needed}. {INSTEAD}"
    version = str(getattr(triton, "__version__", "of an unknown version"))
    parts = re.match(r"(\d+)\.(\d+)", version)
    if parts and (int(parts[1]), int(parts[2])) < OLDEST:
        return f"Triton {version} is installed, {needed}. {INSTEAD}"
    try:
        importlib.import_module("selbp.triton_kernels.cross_entropy")
    except (ImportError, AttributeError) as error:
        return f"Triton {version} is installed and does not fit ({error}), {needed}. {INSTEAD}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"selbp: {reason}", RuntimeWarning, stacklevel=4)


def kernels(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """The module ``selbp.triton_kernels.<name>``; None where the reference must take these tensors."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return None
    if reason := unavailable():
        _warn_once(reason)
        return None
    return importlib.import_module(f"selbp.triton_kernels.{name}")
