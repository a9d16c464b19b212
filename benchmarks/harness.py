"""How a benchmark is written and run.

A suite is a module ``bench_<name>.py`` with ``CASES``, a list of :class:`Case`, and ``test_<name> = suite(CASES)`` for
pytest-benchmark. ``python -m benchmarks`` runs the contenders of a case interleaved, in an order shuffled anew each
round, so that a drift of the machine meets all of them alike; it reports medians, 20th and 80th percentiles, each
contender's ratio to ours and the fraction of the roofline, whose byte and flop formula stands beside the case.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.roofline import Roofline

MIN_SAMPLE_SECONDS = 1e-3  # a shorter call is repeated within a sample until the sample takes this long


@dataclass(frozen=True)
class Unavailable:
    """Stands for a contender that cannot run here; the tables say why."""

    reason: str


@dataclass(frozen=True)
class Case:
    """One task at one shape, and who competes at it."""

    name: str  # task and shape, unique within the suite
    inputs: Callable[[torch.device], tuple[Any, ...]]  # what every contender is called with
    contenders: Mapping[str, Callable[..., object] | Unavailable]  # the first one is ours
    flops: float = 0.0  # that the task needs at least
    nbytes: float = 0.0  # that the task must move at least
    formula: str = ""  # where the two come from, for the reader
    dtype: torch.dtype = torch.float32  # whose GEMM rate bounds the flops
    working_set: int | None = None  # bytes that decide the level of the memory hierarchy; None: `nbytes`
    limits: Mapping[str, float] = field(default_factory=dict)  # contender -> greatest allowed ours / contender
    quick: bool = False  # also runs with --quick
    rounds: int = 7  # at least

    def bind(self, device: torch.device, seed: int = 0) -> dict[str, Callable[[], object]]:
        """The contenders that can run here, ready to call, on inputs drawn from ``seed``."""
        torch.manual_seed(seed)
        inputs = self.inputs(device)
        return {
            name: functools.partial(contender, *inputs)
            for name, contender in self.contenders.items()
            if not isinstance(contender, Unavailable)
        }

    def bound(self, roofline: Roofline) -> float:
        """Seconds that the task takes at best on this machine; 0 where no formula is given."""
        compute = self.flops / roofline.flops(self.dtype) if self.flops else 0.0
        if not self.nbytes:
            return compute
        return max(compute, self.nbytes / roofline.read(int(self.working_set or self.nbytes)))


@dataclass
class Row:
    """A contender's result; the times are seconds per call."""

    case: str
    contender: str
    median: float
    p20: float
    p80: float
    samples: int
    ratio: float  # this contender's median / ours
    roofline: float  # the bound / this contender's median
    gflops: float
    gbytes: float
    formula: str
    limit: float | None  # greatest allowed ours / this contender
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether ours met the limit against this contender; None where there is no limit."""
        return None if self.limit is None or not self.ratio > 0 else 1.0 / self.ratio <= self.limit


class Clock:
    """``wall`` or ``process`` (CPU seconds of all threads: unmoved by other programs on a shared machine)."""

    def __init__(self, kind: str, device: torch.device):
        if kind not in ("wall", "process"):
            raise ValueError(f"clock must be wall or process, got {kind!r}")
        self.kind, self.device = ("cuda events" if device.type == "cuda" else kind), device
        self._now = time.process_time if kind == "process" else time.perf_counter
        self._flush = torch.empty(1 << 26, device=device) if device.type == "cuda" else None

    def sample(self, contender: Callable[[], object], calls: int) -> float:
        """Seconds per call over ``calls`` calls; on CUDA each call starts with a cold L2."""
        if self._flush is not None:
            return self._cuda(contender, calls)
        start = self._now()
        for _ in range(calls):
            contender()
        return (self._now() - start) / calls

    def _cuda(self, contender: Callable[[], object], calls: int) -> float:
        assert self._flush is not None
        total = 0.0
        for _ in range(calls):
            self._flush.zero_()  # 256 MiB: larger than any L2
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            contender()
            end.record()
            end.synchronize()
            total += begin.elapsed_time(end) / 1e3
        return total / calls


def run_case(case: Case, roofline: Roofline, clock: Clock, seconds: float, seed: int = 0) -> list[Row]:
    """Time every contender of ``case``, interleaved, for about ``seconds`` in all."""
    present = case.bind(roofline.device, seed)
    ours = next(iter(case.contenders))
    calls, budget = {}, 0.0
    for name, call in present.items():  # twice: the first call builds and caches what it needs
        call()
        once = max(clock.sample(call, 1), 1e-7)
        calls[name] = max(1, round(MIN_SAMPLE_SECONDS / once))
        budget += once * calls[name]
    rounds = max(case.rounds, min(200, int(seconds / max(budget, 1e-9))))
    order, shuffle = list(present), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in present}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(clock.sample(present[name], calls[name]))
    finally:
        gc.enable()
    bound = case.bound(roofline)
    middle = {name: statistics.median(times) for name, times in samples.items()}
    rows = []
    for name, call in case.contenders.items():
        if isinstance(call, Unavailable):
            nan = float("nan")
            rows.append(Row(case.name, name, nan, nan, nan, 0, nan, nan, nan, nan, case.formula, None, call.reason))
            continue
        low, *_, high = statistics.quantiles(samples[name], n=5)
        time_ = middle[name]
        rows.append(
            Row(case.name, name, time_, low, high, len(samples[name]), time_ / middle[ours], bound / time_,
                case.flops / time_ / 1e9, case.nbytes / time_ / 1e9, case.formula, case.limits.get(name))
        )  # fmt: skip
    return rows


def suite(cases: Sequence[Case]) -> Callable[..., None]:
    """A test of each contender of the quick cases: ``pytest benchmarks/bench_x.py --benchmark-only``."""
    import pytest

    pairs = [
        pytest.param(case, name, id=re.sub(r"[^\w=.-]+", "-", f"{case.name} {name}"))
        for case in cases if case.quick for name in case.contenders
    ]  # fmt: skip

    @pytest.mark.parametrize("case,name", pairs)
    def test(case: Case, name: str, benchmark: Any) -> None:
        contender = case.contenders[name]
        if isinstance(contender, Unavailable):
            pytest.skip(contender.reason)
        benchmark.group = case.name
        benchmark.extra_info.update(flops=case.flops, bytes=case.nbytes, formula=case.formula)
        benchmark(case.bind(torch.device("cpu"))[name])

    return test


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """Bytes by which the resident set rises at most above its level before ``call``; Linux, CPU."""
    call()  # what the first call caches is not the call's own
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path(f"/proc/{os.getpid()}/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
