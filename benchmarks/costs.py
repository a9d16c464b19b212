"""What a call costs beside its time: reads back to the host, and memory.

``python -m benchmarks.costs SUITE...`` prints the peak memory of every contender as JSON. It is a process of its own:
the allocator there gives freed memory back at once, so that the resident set follows what is in use, which would spoil
the times.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Blocks this large are then mapped and returned singly.
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SLOW = 0.1  # seconds: reads are counted at the first call of what takes longer, else at the second
SLOW_PEAK = 0.5  # the same for the peak, which more of what a first call caches would spoil

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
_COPIES = {"_to_copy", "copy_"}


def _off_the_device(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"


class _Dispatched(TorchDispatchMode):
    """Counts operators that wait for a value, or for the length of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in _READS
        if name in ("index", "index_put", "index_put_"):  # a mask becomes indices
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif name == "repeat_interleave":
            self.count += func._overloadname == "Tensor" and (kwargs or {}).get("output_size") is None
        result = func(*args, **(kwargs or {}))
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0]
            self.count += _off_the_device(result) and not _off_the_device(source)
        return result


class _Called(TorchFunctionMode):
    """Counts, of tensors on the CPU, the methods that would wait for a device: there they reach no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "__array__"):
            self.count += _off_the_device(args[0])
        return func(*args, **(kwargs or {}))


def host_reads(call: Callable[[], object]) -> tuple[int, object]:
    """How often ``call`` reads a value or a data-dependent length back, and what it returns.

    On a GPU each of them waits for all work before it. On the CPU tensors stand for those on a GPU: conversions that
    cost nothing there (``.cpu()``, ``.tolist()``) count all the same, and so does what code does for CPU tensors only.
    """
    with _Called() as called, _Dispatched() as dispatched:
        result = call()
    return called.count + dispatched.count, result


# ------------------------------------------------------------------------------------------------------------ memory


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most above its level before ``call``; Linux, CPU.

    True in a process started with ``RETURN_FREED``: elsewhere a block that was freed may stay resident and serve again.
    """
    call()  # what the first call caches is not the call's own
    return _rise(call)


def _rise(call: Callable[[], object]) -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _peak(call: Callable[[], object], device: torch.device) -> int:
    start = time.process_time()
    if device.type == "cuda":
        call()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    rise = _rise(call)
    return rise if time.process_time() - start > SLOW_PEAK else _rise(call)


def peaks(cases: Iterable[Any], device: torch.device, seed: int) -> dict[str, dict[str, int]]:
    """``{case: {contender: bytes}}``; a contender that fails is left out."""
    found: dict[str, dict[str, int]] = {}
    for case in cases:
        found[case.name] = {}
        print(f"peak memory: {case.name}", file=sys.stderr, flush=True)
        try:
            present = case.bind(case.draw(device, seed))
        except Exception as error:
            print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        for name, call in present.items():
            try:
                found[case.name][name] = _peak(call, device)
            except Exception as error:
                print(f"{case.name}: {name}: {type(error).__name__}: {error}", file=sys.stderr)
    return found


def measure_peaks(names: list[str], options: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Those of the suites ``names``, each measured in the same fresh process; empty where the system has no such mark.

    ``options`` go to ``python -m benchmarks.costs``.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.costs", *names, *options],
        env={**os.environ, **RETURN_FREED}, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        print(f"benchmarks: peak memory is missing: its process ended with {done.returncode}", file=sys.stderr)
        return {}
    found: dict[str, dict[str, dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The process that measures memory: the arguments of ``python -m benchmarks``, JSON on the last line."""
    from benchmarks.__main__ import cases_of, limit_threads, parser

    options = parser().parse_args()
    limit_threads(options.threads)
    chosen = {name: cases_of(name, options.quick, options.filter) for name in options.names}
    gc.freeze()  # the modules' objects: a collection before each call would go through them
    found = {name: peaks(cases, options.device, options.seed) for name, cases in chosen.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
