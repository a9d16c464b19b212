"""The benchmark harness measures what it says, and its verdict can fail."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.harness import Case, Clock, Unavailable, peak_extra_bytes, run_case
from benchmarks.roofline import Roofline

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def sleepers(limit=None):
    return Case(
        "sleep",
        lambda device: (0.002,),
        {"ours": time.sleep, "twice": lambda s: time.sleep(2 * s), "peer": Unavailable("peer is not installed")},
        nbytes=1 << 20,
        formula="none",
        limits={} if limit is None else {"twice": limit},
        quick=True,
    )


@pytest.fixture(scope="module")
def roofline():
    return Roofline(CPU, threads=1, quick=True)


def test_medians_ratios_and_limits(roofline):
    ours, twice, peer = run_case(sleepers(limit=0.7), roofline, Clock("wall", CPU), seconds=0.1)
    assert ours.median >= 0.002 and ours.ratio == 1.0 and ours.p20 <= ours.median <= ours.p80
    assert 1.3 < twice.ratio < 2.5 and twice.passed
    assert peer.note == "peer is not installed" and peer.passed is None
    _, twice, _ = run_case(sleepers(limit=0.1), roofline, Clock("wall", CPU), seconds=0.1)
    assert twice.passed is False


def test_process_clock_does_not_count_waiting(roofline):
    ours, *_ = run_case(sleepers(), roofline, Clock("process", CPU), seconds=0.1)
    assert ours.median < 0.001


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


def test_peak_extra_bytes():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert peak_extra_bytes(lambda: torch.ones(1 << 24)) >= 0.9 * (1 << 26)
    assert peak_extra_bytes(lambda: None) < 1 << 20


def test_files(tmp_path, roofline):
    rows = run_case(sleepers(limit=0.1), roofline, Clock("wall", CPU), seconds=0.1)
    files = report.write(tmp_path / "new", {"nap": rows}, report.machine(CPU, 1, "wall"), roofline.table())
    assert {"results.json", "results.csv", "results.md"} <= {file.name for file in files}
    whole = json.loads((tmp_path / "new" / "results.json").read_text())
    assert [row["contender"] for row in whole["rows"]] == ["ours", "twice", "peer"]
    assert whole["rows"][2]["median"] is None and whole["machine"]["torch"] == torch.__version__
    with (tmp_path / "new" / "results.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    text = (tmp_path / "new" / "results.md").read_text()
    assert "MISSED" in text and "peer is not installed" in text


def test_command_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "_cases", lambda name, quick, text: [sleepers(limit=0.1)])
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    arguments = ["gram", "--quick", "--seconds", "0.1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0 and command.main([*arguments, "--check"]) == 1
    assert "Limits missed: sleep against twice" in capsys.readouterr().out
    assert command.main(["nosuch"]) == 2 and "no suite nosuch" in capsys.readouterr().err
    assert command.main(["gram", "--list"]) == 0 and "gram: sleep" in capsys.readouterr().out


def test_every_suite_lists_its_cases_and_names_them_once():
    for name in command.SUITES:
        names = [case.name for case in command._cases(name, quick=False, text="")]
        assert names and len(set(names)) == len(names)
        assert command._cases(name, quick=True, text=""), f"{name} has no quick case"


def test_suites_run_under_pytest_benchmark():
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_gram.py", "--benchmark-only",
         "--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off", "-k", "128"],
        cwd=ROOT, text=True, capture_output=True, timeout=120, env=env,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "Median" in result.stdout
