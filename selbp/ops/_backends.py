"""What an operator runs on: the Triton kernels, the compiled CUDA core, and the threads of the native CPU core.

Triton and the CUDA core are optional, and imported when a CUDA tensor first needs them, never with selbp. Where Triton
is missing or too old, or where a tensor is float64 (its kernels accumulate in float32), the reference implementation
runs: correct, without a synchronisation. A Triton that is missing or too old is warned of once.

A native kernel uses torch's own number of threads, and one after a fork: libgomp's worker threads do not survive
``fork``, and a child of a process that has run a parallel region would wait for them for ever. So a forked process
(a DataLoader worker, say) runs the native kernels serially.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from types import ModuleType

import torch
from torch import Tensor

OLDEST = (3, 4)  # the first Triton with tensor descriptors
INSTEAD = (
    "CUDA tensors use the reference implementation, which is correct and slower: "
    f"pip install 'triton>={OLDEST[0]}.{OLDEST[1]}', which torch 2.8 and newer bring"
)
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        importlib.import_module("selbp.triton_kernels.launch")
    except (ImportError, AttributeError) as error:
        return f"Triton {version} is installed and does not fit ({error}), {needed}. {INSTEAD}"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"selbp: {reason}", RuntimeWarning, stacklevel=4)


def kernels(*tensors: Tensor | None) -> ModuleType | None:
    """The module ``selbp.triton_kernels.launch``; None where the reference must take these tensors."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return None
    if reason := unavailable():
        _warn_once(reason)
        return None
    return importlib.import_module("selbp.triton_kernels.launch")


def saves_launches(device: torch.device) -> bool:
    """Whether a step uses operators of one launch each: on a GPU, and on meta tensors, where launches are counted."""
    return device.type in ("cuda", "meta")


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now is recorded in a CUDA graph and not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch asks the current device's stream
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def cuda_core() -> tuple[ModuleType | None, str]:
    """The module ``selbp._native_cuda``, or None and why there is none."""
    try:
        return importlib.import_module("selbp._native_cuda"), ""
    except ImportError as error:
        return None, f"{error} (SELBP_CUDA=1 at installation builds it wherever nvcc is)"


def native_threads(work: int | None = None, grain: int = 32768) -> int:
    """Threads for a native kernel that does ``work`` units, at least ``grain`` of them on each thread."""
    if _forked:
        return 1
    threads = torch.get_num_threads()
    return threads if work is None else max(1, min(threads, work // grain))
