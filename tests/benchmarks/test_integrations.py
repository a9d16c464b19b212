"""``python -m benchmarks integrations``: its comparison with a loop by hand, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import integrations
from benchmarks.frameworks import FRAMEWORKS

RESULTS = Path(integrations.__file__).parent / "results"


def test_what_is_missing_is_named(monkeypatch, capsys):
    find = integrations.importlib.util.find_spec
    absent = ("transformers", "trl", "datasets")
    monkeypatch.setattr(integrations.importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    assert set(integrations.missing()) == set(FRAMEWORKS)
    assert "transformers" in integrations.missing()["by hand"]
    assert integrations.main(["--quick"]) == 0
    assert "not installed: transformers, trl, datasets" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--publish", "--quick"]], ids=["rounds", "publish"])
def test_bad_input(arguments, capsys):
    with pytest.raises(SystemExit) as found:
        integrations.main(arguments)
    assert found.value.code == 2


def test_nothing_is_published_without_memory(monkeypatch, capsys, tmp_path):
    rows = [{"framework": "by hand", "arm": "full", "right to": 0.0, "milliseconds": 1.0, "time over full": 1.0}]
    rows[0] |= {"megabytes": None, "memory over full": None}
    monkeypatch.setattr(integrations, "measure", lambda *_: rows)
    monkeypatch.setattr(integrations, "RESULTS", tmp_path)
    assert integrations.main(["--publish"]) == 1 and not list(tmp_path.iterdir())
    assert "not published" in capsys.readouterr().err
    rows[0] |= {"megabytes": 2.0, "memory over full": 1.0}
    assert integrations.main(["--publish"]) == 0
    assert "| 2 | 1.00 |" in (tmp_path / "integrations.md").read_text()


def bound(arm):
    """A framework's own loss may divide by a float32 count."""
    return 1e-6 if arm == "full" else 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("framework", list(FRAMEWORKS))
def test_each_loop_gives_the_gradient_of_its_choice(framework):
    if (why := integrations.missing().get(framework)) is not None:
        pytest.skip(why)
    for arm in integrations.ARMS:
        assert integrations.deviation((framework, arm)) < bound(arm), arm


def test_the_table_is_that_of_the_result_file():
    result = json.loads((RESULTS / "integrations.json").read_text())
    assert (RESULTS / "integrations.md").read_text() == integrations.markdown(result)
    assert [row["arm"] for row in result["rows"]] == list(integrations.ARMS) * len(FRAMEWORKS)
    assert all(row["right to"] < bound(row["arm"]) for row in result["rows"])
