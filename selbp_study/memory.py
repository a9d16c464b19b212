"""The memory of a step: bytes of the tensors that are alive, and the resident set of a process.

The first is exact and the same on every machine, but does not see what a kernel allocates and frees within itself.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.rows.gradient import Wrapper

# A process started so maps blocks of this size singly and returns them when they are freed: its resident set then
# follows what is in use.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators made while it was on; ``peak`` is the most that were alive at once.

    It follows a row gradient's operators into their rules, where the k-row copies are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and look at what is alive then."""
        for value in pytree.tree_leaves((args, kwargs)):
            self._note(value, made=False)
        wrapper = next((kind for kind in types if issubclass(kind, Wrapper)), None)
        if wrapper is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = wrapper.__torch_dispatch__(func, types, args, kwargs)
        for value in pytree.tree_leaves(out):
            self._note(value, made=True)
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out

    def _note(self, value: Any, made: bool) -> None:
        if isinstance(value, Tensor) and not isinstance(value, Wrapper):
            storage = value.untyped_storage()
            if storage._cdata not in self._alive:  # a storage that an operator was given is not one that it made
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() if made else 0


def live_peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at once during ``call``, beyond those that were before."""
    with LiveBytes() as seen:
        call()
    return seen.peak


def resident_peak(call: Callable[[], object], times: int = 3) -> int:
    """Bytes by which the resident set of this process rises at most; a fresh process tells most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_bytes("VmRSS")
    for _ in range(times):
        call()
    return status_bytes("VmHWM") - before


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most above its level before ``call``; Linux, CPU.

    True in a process started with ``RETURN_FREED``: elsewhere a block that was freed may stay resident and serve again.
    """
    call()  # what the first call caches is not the call's own
    return rise(call)


def rise(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most above its level before ``call``, the first one or another."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status_bytes("VmRSS")
    call()
    return max(0, status_bytes("VmHWM") - before)


def status_bytes(key: str) -> int:
    """A size that the kernel tells of this process, such as ``VmRSS``."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def printed_by(module: str, *arguments: object) -> str:
    """What ``python -m module arguments`` prints in a fresh process that returns freed memory."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, **RETURN_FREED}
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
