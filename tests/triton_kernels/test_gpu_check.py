"""The checks for a machine with a GPU, kept working where there is none: every part, at the smallest shapes."""

import argparse
import contextlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time
import types

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
import gpu_check  # noqa: E402
from gpu_parts import bits  # noqa: E402
from gpu_parts.results import Results  # noqa: E402

PARTS = ("parity", "bits", "sanitizer", "operators", "selection", "steps", "graph")


def test_every_part_runs_on_a_cpu(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = (tmp_path / "out" / "results.md").read_text()
    rows = {}
    for part in PARTS:
        written = json.loads((tmp_path / "out" / f"{part}.json").read_text())
        assert written["complete"] and all(written["complete"].values()) and written["rows"]
        assert f"## {part}" in table
        rows[part] = written["rows"]
    for kernel in ("statistics", "sketch", "linear_cross_entropy", "gram", "logits_statistics", "residual"):
        assert any(name.startswith(f"{kernel} ") for name in rows["operators"]), kernel
    assert any(row["good"] for row in rows["parity"].values()) and any(row["good"] for row in rows["bits"].values())
    for way in ("full", "random", "recompute", "rows", "cut"):
        assert rows["steps"][f"MLP {way} n=16"]["good"] is True


def test_what_is_whole_is_not_run_again_and_an_error_is_a_row(tmp_path, capsys):
    ran = []

    def broken():
        ran.append("broken")
        raise ValueError("a silly reason")

    def good(results):
        ran.append("good")
        results.add("row | 1", True, error=0.5)

    for _ in range(2):
        results = Results(tmp_path, "parity")
        results.row("broken", broken)
        results.row("good", lambda: good(results))  # noqa: B023
    assert ran == ["broken", "good", "broken"]
    assert results.failed == ["broken: error"] and "silly reason" in results.markdown()
    assert "| row / 1 | yes |" in results.markdown()
    results.row("broken", lambda: None)
    assert results.failed == [] and Results(tmp_path, "parity").failed == []


def test_the_shares_of_a_part_become_one_file_and_go_on_from_it(tmp_path, capsys):
    ran = []

    def work(results, share, attempt):
        ran.append((share, attempt))
        if (share, attempt) == (2, 0):
            raise ValueError("once")
        results.add(f"row {share}", share != 1)

    for attempt in range(2):
        for share in range(3):
            results = Results(tmp_path, "parity", share, 3)
            for unit in range(3):  # each process names every unit, and runs its own
                results.row(f"unit {unit}", lambda: work(results, share, attempt))  # noqa: B023
        merged = Results(tmp_path, "parity")
        merged.merge(3)
        assert merged.failed == (["row 1"] if attempt else ["row 1", "unit 2: error"])
        assert [path.name for path in tmp_path.iterdir()] == ["parity.json"]
    assert ran == [(0, 0), (1, 0), (2, 0), (2, 1)] and merged.rows.keys() == {"row 0", "row 1", "row 2"}


PART = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({pid!r} + ".begun", "w").write(str(child.pid))
os.rename({pid!r} + ".begun", {pid!r})
{then}
"""


def running(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"  # ended, if not yet reaped


@pytest.mark.parametrize("then", ["child.wait()", "sys.exit(1)"], ids=["out of time", "dead"])
def test_what_a_part_has_started_ends_with_it(tmp_path, monkeypatch, capsys, then):
    """Else it would run beside the next part's timings."""
    part, pid = tmp_path / "part.py", tmp_path / "pid"
    part.write_text(PART.format(pid=str(pid), then=then))

    class Job(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None or then == "sys.exit(1)":
                return super().wait(timeout)
            while not pid.exists():
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu_check, "__file__", str(part))
    monkeypatch.setattr(gpu_check.subprocess, "Popen", Job)
    options = argparse.Namespace(tiny=False, quick=False, only=["sanitizer"], device="cpu", out=tmp_path, budget=600.0)
    assert gpu_check.supervise("sanitizer", options)[1] is False
    child = int(pid.read_text())
    try:
        for _ in range(1000):  # a signal that is sent is not yet received
            if not running(child):
                break
            time.sleep(0.01)
        assert not running(child)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_quick_run_brings_its_rows_back_though_it_is_cut_off(tmp_path, monkeypatch, capsys):
    """What ends it arrives while a part is waited for; the table and the rows go where a lent machine is read."""
    monkeypatch.setenv("OUT", str(tmp_path / "back"))
    (tmp_path / "back").mkdir()
    command = ["gpu_check.py", "--quick", "--device", "cpu", "--tiny", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    ran = []

    def supervise(part, options):
        ran.append(part)
        results = Results(options.out, part)
        results.add(f"row of {part}", True)
        if len(ran) == 2:
            sys.exit(128 + signal.SIGTERM)
        return results, True

    monkeypatch.setattr(gpu_check, "supervise", supervise)
    with pytest.raises(SystemExit):
        gpu_check.main()
    assert ran == list(gpu_check.QUICK)[:2] and set(gpu_check.QUICK) <= set(PARTS)
    assert sum(gpu_check.QUICK.values()) <= 450.0
    parts = json.loads((tmp_path / "back" / "gpu-check.json").read_text())["parts"]
    assert [parts[part]["rows"][f"row of {part}"]["good"] for part in ran] == [True, True]
    assert f"row of {ran[1]}" in (tmp_path / "back" / "gpu-check.md").read_text()
    assert (tmp_path / "back" / "gpu-check.md").read_text() == (tmp_path / "out" / "results.md").read_text()


def test_the_gpu_tests_are_those_of_every_folder(tmp_path, monkeypatch):
    ran = []
    done = types.SimpleNamespace(stdout="1 passed", stderr="", returncode=0)
    monkeypatch.setattr(bits.subprocess, "run", lambda command, **how: (ran.append((command, how)), done)[1])
    bits.gpu_tests(Results(tmp_path, "bits"), "cuda")
    ((command, how),) = ran
    assert how["cwd"] / command[-1] == SCRIPT.parents[1] / "tests"


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--device", "tpu"]], ids=str)
def test_other_parts_and_devices_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 2 and "invalid choice" in capsys.readouterr().err
