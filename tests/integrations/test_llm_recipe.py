"""The recipe of ``examples/llm`` runs from nothing to its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "llm"
ARMS = ["full", "random", "top loss by the token", "matching, sketched"]


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
