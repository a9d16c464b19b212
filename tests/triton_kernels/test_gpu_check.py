"""The checks for a machine with a GPU, kept working where there is none: every part, at the smallest shapes."""

import json
import pathlib
import runpy
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "gpu_check.py"
sys.path.insert(0, str(SCRIPT.parent))
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
            results.row(f"unit {share}", lambda: work(results, share, attempt))  # noqa: B023
        merged = Results(tmp_path, "parity")
        merged.merge(3)
        assert merged.failed == (["row 1"] if attempt else ["row 1", "unit 2: error"])
        assert [path.name for path in tmp_path.iterdir()] == ["parity.json"]
    assert ran == [(0, 0), (1, 0), (2, 0), (2, 1)] and merged.rows.keys() == {"row 0", "row 1", "row 2"}


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--device", "tpu"]], ids=str)
def test_other_parts_and_devices_are_refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert caught.value.code == 2 and "invalid choice" in capsys.readouterr().err
