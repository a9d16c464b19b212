"""Whether CUDA tensors run on the Triton kernels, and why not where they do not.

Triton is optional and imported on the first CUDA call, never with selbp. Where it is missing, or where a tensor is
float64 (the kernels accumulate in float32), the reference implementation runs: correct, without a synchronisation.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot be used in this process; None where they can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is missing, so CUDA tensors use the reference implementation: pip install triton ({error})"
    try:
        importlib.import_module("selbp.triton_kernels.cross_entropy")
    except (ImportError, AttributeError) as error:
        return f"this Triton does not fit, so CUDA tensors use the reference implementation: {error}"
    return None


def kernels(name: str, *tensors: Tensor | None) -> ModuleType | None:
    """The module ``selbp.triton_kernels.<name>``; None where the reference must take these tensors."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors) or unavailable():
        return None
    return importlib.import_module(f"selbp.triton_kernels.{name}")
