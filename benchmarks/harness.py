"""How a benchmark is written and run.

A suite is a module ``bench_<name>.py`` with ``CASES``, a list of :class:`Case`, and ``test_<name> = suite(CASES)`` for
pytest-benchmark. ``python -m benchmarks`` runs the contenders of a case interleaved, in an order shuffled anew each
round, so that a drift of the machine meets all of them alike; before each sample the contender runs once untimed, so
that the caches hold what it left there, not what its predecessor did. It reports medians, 20th and 80th percentiles,
each contender's ratio to ours and the fraction of the roofline, whose byte and flop formula stands beside the case.

A contender's name says what it is: ``"ours"`` is the one that others are compared with, ``"ours: ..."`` a variant of
it; one with the word ``alone`` does only a part of the task, and so is a mark to measure by, not a peer.
"""

from __future__ import annotations

import functools
import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.host_reads import host_reads
from benchmarks.roofline import Roofline

SLOW = 0.1  # seconds: reads are counted at the first call of what takes longer, else at the second

__all__ = ["Case", "Clock", "Row", "Unavailable", "run_case", "suite"]

MIN_SAMPLE_SECONDS = 1e-3  # a shorter call is repeated within a sample until the sample takes this long
SHORT = 0.02  # seconds: a sample shorter than this follows a call that is not timed, so that each meets its own caches
NAN = float("nan")


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
    rounds: int = 7  # at least, but for a contender that would take four times its share of the seconds
    # (call, what it returned so far, inputs) -> "residual", "bias", "bias_error"
    quality: Callable[[Callable[[], Any], list[Any], tuple[Any, ...]], Mapping[str, float]] | None = None
    ideal: Callable[[Mapping[str, float]], float] | None = None  # seconds by contender -> the least possible
    samples: int = 0  # that one call trains on

    def draw(self, device: torch.device, seed: int = 0) -> tuple[Any, ...]:
        """The inputs; torch's and numpy's global generators start from ``seed``."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        return self.inputs(device)

    def bind(self, inputs: tuple[Any, ...]) -> dict[str, Callable[[], object]]:
        """The contenders that can run here, ready to call."""
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
    """A contender's result; the times are seconds per call, and what was not measured is NaN."""

    case: str
    contender: str
    median: float = NAN
    p20: float = NAN
    p80: float = NAN
    samples: int = 0
    ratio: float = NAN  # this contender's median / ours
    roofline: float = NAN  # the bound / this contender's median
    gflops: float = NAN
    gbytes: float = NAN
    formula: str = ""
    limit: float | None = None  # greatest allowed ours / this contender
    note: str = ""  # why it was not measured
    residual: float = NAN  # |mean gradient - weighted sum of the chosen ones| / |mean gradient|, mean over draws
    bias: float = NAN  # the same of the expected sum
    bias_error: float = NAN  # what chance leaves in `bias`
    host_reads: float = NAN  # a call
    peak_bytes: float = NAN  # above the inputs
    per_second: float = NAN  # samples of the minibatch
    ideal: float = NAN  # the least possible time / this contender's median

    @property
    def passed(self) -> bool | None:
        """Whether ours met the limit against this contender; None where there is no limit."""
        return None if self.limit is None or not self.ratio > 0 else 1.0 / self.ratio <= self.limit

    @property
    def ours(self) -> bool:
        """Whether it is ours, or a variant of ours."""
        return self.contender == "ours" or self.contender.startswith("ours: ")

    @property
    def peer(self) -> bool:
        """Whether it does the whole task, is not ours, and was measured."""
        return not self.ours and not self.mark and self.ratio > 0

    @property
    def mark(self) -> bool:
        """Whether it does a part of the task only, as something to measure by."""
        return "alone" in self.contender.replace(",", " ").split()


class Clock:
    """``wall`` or ``process`` (CPU seconds of all threads: unmoved by other programs on a shared machine)."""

    def __init__(self, kind: str, device: torch.device):
        if kind not in ("wall", "process"):
            raise ValueError(f"clock must be wall or process, got {kind!r}")
        self.kind, self.device = ("cuda events" if device.type == "cuda" else kind), device
        self._now = time.process_time if kind == "process" else time.perf_counter
        # Unmeasured: no GPU has run this yet.
        self._flush = torch.empty(1 << 26, device=device) if device.type == "cuda" else None

    def sample(self, contender: Callable[[], object], calls: int) -> float:
        """Seconds per call over ``calls`` calls after one that is not timed; on CUDA each starts with a cold L2."""
        if self._flush is not None:
            return self._cuda(contender, calls)
        contender()  # untimed, for every contender: who runs after whom decides nothing, each meets its own caches
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


@dataclass
class _Prepared:
    call: Callable[[], object]
    calls: int  # a sample
    seconds: float  # a sample
    reads: int
    results: list[Any]  # of its first calls, from which the case's quality is computed


def _prepare(call: Callable[[], object], clock: Clock, keep: bool) -> _Prepared:
    """Warm up, count what is read back, and find out how long a sample must be."""
    start = time.process_time()
    reads, result = host_reads(call)
    results = [result] if keep else []
    if time.process_time() - start < SLOW:  # the first call builds and caches what it needs
        reads, result = host_reads(call)
        results += [result] if keep else []
    del result
    once = max(clock.sample(call, 1), 1e-7)
    calls = max(1, round(MIN_SAMPLE_SECONDS / once))
    return _Prepared(call, calls, once * calls, reads, results)


def run_case(case: Case, roofline: Roofline, clock: Clock, seconds: float, seed: int = 0) -> list[Row]:
    """Time every contender of ``case``, interleaved, for about ``seconds`` in all. One that fails is a note."""
    notes = {name: call.reason for name, call in case.contenders.items() if isinstance(call, Unavailable)}
    bound, present, inputs = NAN, dict[str, Callable[[], object]](), tuple[Any, ...]()
    try:
        bound = case.bound(roofline)
        inputs = case.draw(roofline.device, seed)
        present = case.bind(inputs)
    except Exception as error:
        notes |= {name: _failure(error) for name in case.contenders if name not in notes}
    ready: dict[str, _Prepared] = {}
    for name, call in present.items():
        try:
            ready[name] = _prepare(call, clock, keep=case.quality is not None)
        except Exception as error:
            notes[name] = _failure(error)
    samples = _interleaved(ready, case.rounds, clock, seconds, seed)
    middle = {name: statistics.median(times) for name, times in samples.items()}
    ours = middle.get(next(iter(case.contenders)), NAN)
    rows = []
    for name in case.contenders:
        row = Row(case.name, name, formula=case.formula, limit=case.limits.get(name), note=notes.get(name, ""))
        rows.append(row)
        if name not in ready:
            continue
        row.median, row.samples = middle[name], len(samples[name])
        row.p20, *_, row.p80 = statistics.quantiles(samples[name], n=5, method="inclusive")
        row.ratio, row.roofline = row.median / ours, bound / row.median
        row.gflops, row.gbytes = case.flops / row.median / 1e9, case.nbytes / row.median / 1e9
        if row.mark:
            continue
        row.host_reads, row.per_second = ready[name].reads, case.samples / row.median if case.samples else NAN
        if case.ideal is not None:
            row.ideal = case.ideal(middle) / row.median
        if case.quality is not None:
            for key, value in case.quality(ready[name].call, ready[name].results, inputs).items():
                setattr(row, key, value)
    return rows


FAILED = "failed: "


def _failure(error: Exception) -> str:
    """A note of one line."""
    return f"{FAILED}{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _interleaved(
    ready: Mapping[str, _Prepared], least: int, clock: Clock, seconds: float, seed: int
) -> dict[str, list[float]]:
    """Seconds per call, in rounds whose order is shuffled; each contender has at least two.

    One that takes a tenth of ``seconds`` or more is in the first rounds only, so that the others get enough of them.
    """
    quick = sum(entry.seconds for entry in ready.values() if entry.seconds < seconds / 10)
    rounds = max(2, least, min(200, int(seconds / quick) if quick else 0))
    share = {
        name: rounds if entry.seconds < seconds / 10 else max(2, min(least, int(4 * seconds / entry.seconds)))
        for name, entry in ready.items()
    }
    shuffle = random.Random(seed)
    # If one call is long enough to be a sample, the timing that found this out is kept as the first sample.
    samples = {name: [entry.seconds] if entry.calls == 1 else list[float]() for name, entry in ready.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order = [name for name in ready if len(samples[name]) < share[name]]
            shuffle.shuffle(order)
            for name in order:
                if ready[name].seconds < SHORT:
                    ready[name].call()
                samples[name].append(clock.sample(ready[name].call, ready[name].calls))
    finally:
        gc.enable()
    return samples


def suite(cases: Sequence[Case]) -> Callable[..., None]:
    """A test of each contender of the quick cases: ``pytest benchmarks/bench_x.py --benchmark-only``."""
    import pytest

    pairs = [
        pytest.param(case, name, id=re.sub(r"[^\w=.-]+", "-", f"{case.name} {name}"))
        for case in cases
        if case.quick
        for name in case.contenders
    ]

    @pytest.mark.parametrize("case,name", pairs)
    def test(case: Case, name: str, benchmark: Any) -> None:
        contender = case.contenders[name]
        if isinstance(contender, Unavailable):
            pytest.skip(contender.reason)
        benchmark.group = case.name
        benchmark.extra_info.update(flops=case.flops, bytes=case.nbytes, formula=case.formula)
        benchmark(case.bind(case.draw(torch.device("cpu")))[name])

    return test
