"""The compiled CUDA core, imported when a CUDA tensor first needs it; the error of a failed import is kept."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def cuda_core() -> tuple[ModuleType | None, str]:
    """The module ``selbp._native_cuda``, or None and why there is none."""
    try:
        return importlib.import_module("selbp._native_cuda"), ""
    except ImportError as error:
        return None, f"{error} (SELBP_CUDA=1 at installation builds it wherever nvcc is)"
