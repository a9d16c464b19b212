"""Times of several calls, taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def interleaved(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Process-CPU milliseconds of each call, the 20th percentile."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for call in calls * 3:
        call()
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            begin = time.process_time()
            call()
            found.append(1e3 * (time.process_time() - begin))
    return [statistics.quantiles(found, n=5)[0] for found in times]
