"""Peak memory of every contender of a suite.

``python -m benchmarks.memory SUITE...`` prints it as JSON. It is a process of its own: the allocator there gives freed
memory back at once, so that the resident set follows what is in use. That would spoil the times.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from selbp_study.memory import RETURN_FREED, rise

SLOW_PEAK = 0.5  # seconds. Of a longer call the first one is measured; of others the second, whose caches are full


def _peak(call: Callable[[], object], device: torch.device) -> int:
    start = time.process_time()
    if device.type == "cuda":
        call()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    first = rise(call)
    return first if time.process_time() - start > SLOW_PEAK else rise(call)


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

    ``options`` go to ``python -m benchmarks.memory``.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *names, *options],
        env={**os.environ, **RETURN_FREED},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
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
