"""The benchmark harness measures what it says, and its verdict can fail."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.harness import Case, Clock, Unavailable, run_case
from benchmarks.host_reads import host_reads
from benchmarks.memory import measure_peaks
from benchmarks.roofline import Roofline
from selbp_study.memory import RETURN_FREED

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
resets_its_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def workers(ticker, limit=None):
    return Case(
        "work",
        lambda device: (0.002,),
        {"ours": ticker.work, "twice": lambda s: ticker.work(2 * s), "peer": Unavailable("peer is not installed")},
        nbytes=1 << 20,
        formula="none",
        limits={} if limit is None else {"twice": limit},
        quick=True,
    )


@pytest.fixture(scope="module")
def roofline():
    return Roofline(CPU, threads=1, quick=True)


def test_medians_ratios_and_limits(roofline, ticker):
    ours, twice, peer = run_case(workers(ticker, limit=0.7), roofline, Clock("wall", CPU), seconds=0.1)
    assert (ours.p20, ours.median, ours.p80, ours.ratio) == pytest.approx((0.002, 0.002, 0.002, 1.0))
    assert twice.ratio == pytest.approx(2.0) and twice.passed
    assert peer.note == "peer is not installed" and peer.passed is None
    _, twice, _ = run_case(workers(ticker, limit=0.1), roofline, Clock("wall", CPU), seconds=0.1)
    assert twice.passed is False


@pytest.mark.parametrize("kind, seconds", [("process", 0.002), ("wall", 0.012)])
def test_process_clock_does_not_count_waiting(roofline, ticker, kind, seconds):
    case = Case("x", lambda device: (), {"ours": lambda: (ticker.work(0.002), ticker.wait(0.01))})
    (ours,) = run_case(case, roofline, Clock(kind, CPU), seconds=0.001)
    assert ours.median == pytest.approx(seconds)


def test_roofline_is_plausible_and_measured_once(roofline):
    assert roofline.flops(torch.float32) == roofline.flops(torch.float32) > 1e9
    assert roofline.read(100_000) == roofline.read(131_072) > 1e8
    assert roofline.copy(1 << 20) > 1e8
    assert {"read 128 KiB GB/s", "copy 1024 KiB GB/s"} <= set(roofline.table())


def test_bound_is_the_slower_of_compute_and_traffic(roofline):
    rate, bandwidth = roofline.flops(torch.float32), roofline.read(1 << 20)
    traffic = Case("x", lambda device: (), {}, flops=1.0, nbytes=1 << 20)
    compute = Case("x", lambda device: (), {}, flops=1e12, nbytes=1 << 20)
    assert traffic.bound(roofline) == (1 << 20) / bandwidth
    assert compute.bound(roofline) == 1e12 / rate


PEAKS = """
import torch
from selbp_study.memory import peak_extra_bytes
print(peak_extra_bytes(lambda: torch.ones(1 << 24)), peak_extra_bytes(lambda: None))
"""


@resets_its_peak
def test_peak_extra_bytes():
    command, environment = [sys.executable, "-c", PEAKS], {**os.environ, **RETURN_FREED}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    large, nothing = map(int, done.stdout.split())
    assert large >= 0.9 * (1 << 26) and nothing < 1 << 20


def fails():
    raise RuntimeError("no such thing\nand more")


def test_a_contender_that_fails_is_a_note_and_the_others_run(roofline):
    case = Case("x", lambda device: (), {"ours": lambda: 0, "peer": fails}, quick=True)
    ours, peer = run_case(case, roofline, Clock("wall", CPU), seconds=0.01)
    assert ours.median > 0 and math.isnan(peer.median) and peer.note == "failed: RuntimeError: no such thing"
    broken = Case("y", lambda device: fails(), {"ours": lambda: 0})
    (ours,) = run_case(broken, roofline, Clock("wall", CPU), seconds=0.01)
    assert ours.note.startswith("failed: ") and command._verdict({"s": [ours]}, check=False) == 1
    assert command._verdict({"s": [peer]}, check=True) == 0  # a peer's failure is its own


def test_marks_and_variants_are_no_peers(roofline, ticker):
    names = (
        "ours",
        "ours: other",
        "its GEMM alone",
        "forward alone",
        "its GEMMs alone, whole",
        "eager",
    )
    case = Case(
        "x",
        lambda device: (),
        dict.fromkeys(names, lambda: ticker.work(1e-4)),
        samples=10,
        ideal=lambda t: 2 * t["eager"],
    )
    rows = {row.contender: row for row in run_case(case, roofline, Clock("wall", CPU), seconds=0.01)}
    assert [name for name, row in rows.items() if row.peer] == ["eager"]
    assert [name for name, row in rows.items() if row.ours] == ["ours", "ours: other"]
    assert rows["eager"].ideal == 2.0 and rows["eager"].per_second == 10 / rows["eager"].median
    assert rows["eager"].host_reads == 0 and math.isnan(rows["its GEMM alone"].ideal)


def test_a_slow_contender_gets_fewer_rounds(roofline, ticker):
    case = Case("x", lambda device: (), {"ours": lambda: ticker.work(1e-4), "slow": lambda: ticker.work(0.03)})
    ours, slow = run_case(case, roofline, Clock("wall", CPU), seconds=0.02)
    assert ours.samples > 7 and slow.samples == 2


X = torch.arange(5.0)


@pytest.mark.parametrize(
    "reads,call",
    [
        pytest.param(0, lambda: torch.where(X > 2, X, 0.0).sort().values.cumsum(0), id="where and sort"),
        pytest.param(0, lambda: X[torch.tensor([1, 2])].to(X.device), id="index of a tensor"),
        pytest.param(1, lambda: X[0].item(), id="item"),
        pytest.param(1, lambda: bool(X[0] > 1), id="bool"),
        pytest.param(1, lambda: X[X > 2], id="mask"),
        pytest.param(1, lambda: X.clone().__setitem__(X > 2, X[:2]), id="masked write"),
        pytest.param(1, lambda: torch.where(X > 2), id="where alone"),
        pytest.param(1, lambda: X.tolist(), id="tolist"),
        pytest.param(1, lambda: X.cpu().numpy(), id="numpy"),
        pytest.param(1, lambda: np.asarray(X), id="asarray"),
        pytest.param(1, lambda: torch.repeat_interleave(X, X.long()), id="repeat_interleave"),
        pytest.param(3, lambda: [float(x) for x in X[:3]], id="a float each"),
    ],
)
def test_host_reads(reads, call):
    assert host_reads(call)[0] == reads


@resets_its_peak
def test_peaks_are_measured_in_a_process_of_their_own():
    name = "gram n=1024 C=100 d=512 float32"
    found = measure_peaks(["gram"], ["--quick", "--filter", name])["gram"][name]
    # The output alone is 4 MiB; the kernel counts resident pages in batches, and some were resident before.
    assert found["ours"] >= 3 << 20 and found["eager torch"] > 1.5 * found["ours"]


def test_cuda_clock_times_each_call_alone_on_a_cold_cache(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 3.0  # milliseconds

    class Flush:
        def zero_(self):
            happened.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock("wall", CPU)
    clock._flush = Flush()
    assert clock.sample(lambda: happened.append("call"), 2) == pytest.approx(0.003)
    assert happened == ["flush", "event", "call", "event", "wait"] * 2


def test_command_line(monkeypatch, capsys, tmp_path, ticker):
    monkeypatch.setattr(command, "cases_of", lambda name, quick, text: [workers(ticker, limit=0.1)])
    monkeypatch.setattr(command, "limit_threads", lambda threads: None)
    monkeypatch.setattr(command.selbp, "keep_freed_memory", lambda: False)
    arguments = ["gram", "--quick", "--seconds", "0.1", "--out", str(tmp_path), "--no-memory", "--clock", "wall"]
    assert command.main(arguments) == 0 and command.main([*arguments, "--check"]) == 1
    shown = capsys.readouterr()
    assert "Limits missed: work against twice" in shown.out and "gram: work" in shown.err
    assert command.main(["gram", "--list"]) == 0 and "gram: work" in capsys.readouterr().out
    assert command.main(["--peers"]) == 0 and "liger-kernel" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_figures(monkeypatch, capsys, tmp_path, ticker):
    def stop(results, options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "cases_of", lambda name, quick, text: [workers(ticker)])
    monkeypatch.setattr(command, "limit_threads", lambda threads: None)
    monkeypatch.setattr(command.selbp, "keep_freed_memory", lambda: False)
    monkeypatch.setattr(command, "_add_peaks", stop)
    arguments = ["gram", "--quick", "--seconds", "0.1", "--out", str(tmp_path), "--clock", "wall"]
    assert command.main(arguments) == 130
    shown = capsys.readouterr()
    assert "interrupted" in shown.err and "| twice |" in shown.out and (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["nosuch"], "no suite nosuch"),
        (["--seconds", "0"], "--seconds must be positive"),
        (["--publish", "--quick"], "--publish is for a whole run"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_missing_extra_is_one_line(monkeypatch, capsys):
    def absent(*_):
        raise ModuleNotFoundError("No module named 'pytest'")

    monkeypatch.setattr(command, "cases_of", absent)
    assert command.main(["gram"]) == 2
    assert "No module named 'pytest': pip install -e '.[bench]'" in capsys.readouterr().err


def test_every_suite_lists_its_cases_and_names_them_once():
    for name in command.SUITES:
        names = [case.name for case in command.cases_of(name, quick=False, text="")]
        assert names and len(set(names)) == len(names)
        assert command.cases_of(name, quick=True, text=""), f"{name} has no quick case"


def test_suites_run_under_pytest_benchmark():
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    short = "--benchmark-only --benchmark-min-rounds=1 --benchmark-max-time=0.001 --benchmark-warmup=off".split()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks",
        *short,
        "-k",
        "gram and 128",
    ]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "Median" in result.stdout
