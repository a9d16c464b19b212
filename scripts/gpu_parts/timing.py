"""Times and launches of work on a GPU, or on a CPU in its stead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def wait(device: str) -> None:
    """Until the device is idle."""
    if device != "cpu":
        torch.cuda.synchronize()


def times(work: Callable[[], Any], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a call: ``host_ms`` until it returns, ``step_ms`` from one end to the next; medians."""
    for _ in range(min(repeats, 3)):
        work()
    wait(device)
    host, whole = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        host.append(1e3 * (time.perf_counter() - begin))
        wait(device)
        whole.append(1e3 * (time.perf_counter() - begin))
    begin = time.perf_counter()
    for _ in range(repeats):  # nothing waits between them: the host runs ahead where it can
        work()
    wait(device)
    queued = 1e3 * (time.perf_counter() - begin) / repeats
    return {"host_ms": statistics.median(host), "alone_ms": statistics.median(whole), "queued_ms": queued}


def launches(work: Callable[[], Any], device: str) -> dict[str, float | None]:
    """``launches`` of a call and the ``device_ms`` that they ran; on a CPU the operators that the dispatcher saw."""
    if device == "cpu":
        with _Counter() as counter:
            work()
        return {"launches": counter.count, "device_ms": None}
    from torch.profiler import ProfilerActivity, profile

    wait(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        wait(device)
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    took = sum(getattr(event, "device_time", 0.0) for event in kernels)
    return {"launches": len(kernels), "device_ms": 1e-3 * took}


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))
