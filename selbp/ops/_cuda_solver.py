"""The solver and the choosers of CUDA tensors: the built core, else what NVRTC compiles at first use, else none.

The built core counts where it runs on the device. It does not where it was compiled for newer devices only, nor with a
driver that is older than the CUDA runtime which is linked in; NVRTC's kernels may.

Where there is none a matching problem is solved on the host: correct, but the device waits, and a CUDA graph cannot
hold it. Rows are chosen by the reference then, in dozens to thousands of launches.
"""

from __future__ import annotations

import warnings
from typing import Any

from selbp.ops import _nvrtc_core
from selbp.ops._backends import cuda_core


@_nvrtc_core.kept
def refusal(core: Any, device: int) -> str:
    """Why the built core does not run on a device; "" where it does."""
    status = core.probe(device) if hasattr(core, "probe") else 0  # one built from older sources cannot be asked
    if status == 0:
        return ""
    reason = f"the CUDA core does not run on cuda:{device}: {core.error_text(status)} ({status})"
    if status in _nvrtc_core.PASSING:
        raise _nvrtc_core.PassingError(reason)
    return reason


def built(device: int) -> tuple[Any, str]:
    """The built core where it runs on a device; else None and why not."""
    core, missing = cuda_core()
    missing = missing if core is None else refusal(core, device)
    return (None, missing) if missing else (core, "")


def solver(device: int, n: int, k: int, is_double: bool) -> tuple[Any, str]:
    """What solves problems of this size on a device: the core or NVRTC's kernels; or None and why there is none."""
    core, missing = built(device)
    if core is not None:
        return core, ""
    made = _nvrtc_core.core(device, is_double)
    if isinstance(made, str):
        return None, f"{missing}; {made}"
    if not made.fits(n, k):
        return None, f"{missing}; n = {n} with k = {k} is more than a block of NVRTC's kernels holds"
    return made, ""


def chooser(device: int) -> Any:
    """What launches the kernels of csrc/selection on a device: the core or NVRTC's; None where there is neither."""
    core, _ = built(device)
    if core is not None:
        return core if hasattr(core, "launch_choice") else None  # one built from older sources has no such kernels
    made = _nvrtc_core.choice(device)
    return None if isinstance(made, str) else made


_warned: set[bool] = set()  # holds an entry once the process has been told


def warn_of_host(missing: str) -> None:
    """Say once per process that problems on a GPU are solved on the host, why, and what helps."""
    if not _warned:
        _warned.add(True)
        warnings.warn(
            f"the matching of CUDA tensors is solved on the host, and the GPU waits for it at each step: {missing}. "
            "Install selbp where nvcc is, or run `pip install nvidia-cuda-nvrtc`.",
            stacklevel=2,
        )
