"""The recipe of ``examples/llm`` runs from nothing to its table, and its page is that of the result file."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "llm"
RESULT = ROOT / "benchmarks" / "results" / "llm.json"
ARMS = ["full", "random", "top loss by the token", "matching, sketched"]


def load_report():
    spec = importlib.util.spec_from_file_location("llm_recipe_report", RECIPE / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_and_the_plot_are_those_of_the_result_file():
    report, result = load_report(), json.loads(RESULT.read_text())
    assert (RESULT.parent / "llm.md").read_text() == report.markdown(result)
    assert (ROOT / "docs" / "_static" / "llm.svg").read_text() == report.plot(result)
    assert list(report.by_arm(result)) == ARMS
    for runs in report.by_arm(result).values():
        for run in runs:
            over = run["curve"][-1][0] - result["setup"]["seconds"]
            assert 0 <= over < 0.1 * result["setup"]["seconds"]  # an arm stops after the step that fills its time


@pytest.mark.slow
def test_a_quick_run(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    if not Path("/usr/share/common-licenses").is_dir():
        pytest.skip("the recipe's text is that of a Debian machine")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, RECIPE / "run.py", "--quick", "--seed", "3", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "llm.json").read_text())
    assert [run["arm"] for run in result["arms"]] == ARMS
    for run in result["arms"]:
        assert run["seed"] == 3
        assert run["steps"] > 0
        assert abs(sum(run["chosen"].values()) - 1) < 1e-3
        assert run["curve"][-1][2] < run["curve"][0][2]  # it learns
    assert (tmp_path / "out" / "llm.md").read_text() in done.stdout
