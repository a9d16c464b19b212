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

# A process started so maps blocks of this size singly and returns them when they are freed: its resident set then
# follows what is in use.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident_peak(call: Callable[[], object], times: int = 3) -> int:
    """Bytes by which the resident set of this process rises at most. Call it in a fresh process."""
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
