"""What others named is shown as it is: no table is broken, no page runs it, no plot sets it as a formula."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from selbp_study import document as study_document
from selbp_study import report
from selbp_study.arms import Arm
from selbp_study.compare import Comparison, Outcome
from selbp_study.config import RunConfig
from selbp_study.document import document, read_result_file, section, study_page
from selbp_study.report import write_report
from selbp_study.run import PHASES
from selbp_study.table import HEADINGS, lines_of, markdown
from selbp_study.text import cells, code, inline, plain

NASTY = {
    "bars": "a | b || c",
    "code": "`rm` and ``",
    "script": "<script>alert(1)</script>",
    "lines": "a\n\n## b\r| c |",
    "bold": "**not bold** *x*",
    "entity": "&lt;b&gt; &amp;",
    "backslash": "a\\|b\\",
    "link": "[x](javascript:alert(1))",
    "image": "<img src=x onerror=alert(1)>",
    "formula": "$\\frac{$ 5$",
    "control": "a\x00b\x1b[31mc",
    "quotes": "\"'><b",
}


class Text(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


@pytest.mark.parametrize("name", NASTY)
def test_a_cell_says_what_was_to_be_said(name: str) -> None:
    text = NASTY[name]
    line = f"| {plain(text)} | 1 | {code('x')} |"
    assert "\n" not in line
    first, second, third = cells(line)
    assert (second, third) == ("1", "`x`")
    found = Text(inline(first))
    assert found.tags == [] and found.text.strip() == shown(text).strip()


def test_marks_of_our_own_still_work() -> None:
    assert inline(f"**ahead** {plain('a*b')} `c|d`") == "<b>ahead</b> a*b <code>c|d</code>"
    assert inline(cells(f"| {code('a|b <c>')} |")[0]) == "<code>a|b &lt;c&gt;</code>"


def results(config: RunConfig, title: str) -> list[Outcome]:
    curve = [{"step": step, "accuracy": 10.0 + step, "backward_samples": step, "seconds": step} for step in (0, 5, 10)]
    result = {
        "config": config.as_dict(),
        "accuracy": 20.0,
        "steps": 10,
        "backward_samples": 10,
        "curve": curve,
        "seconds": dict.fromkeys(PHASES, 1.0),
        "clock": "process",
    }
    arms = [Arm("random"), Arm("top-loss", title=title), Arm("matching", title=title)]
    ends = (Outcome(config, result, arm=arms[0]), Outcome(config, result, arm=arms[1]))
    return [*ends, Outcome(config, None, title, arm=arms[2])]


def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes a second; one name is drawn."""
    for module in (report, study_document):
        for plot in ("curves_plot", "bars_plot"):
            monkeypatch.setattr(module, plot, lambda *_: b"")


@pytest.mark.parametrize("name", NASTY)
def test_a_comparison_of_such_names(
    name: str, tmp_path: Path, dataset, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = NASTY[name]
    if name != "formula":
        without_plots(monkeypatch)
    outcomes = results(config, text)
    lines = lines_of(outcomes)
    rows = [cells(row) for row in markdown(lines).splitlines()]
    assert len(rows) == 5 and {len(row) for row in rows} == {len(HEADINGS)}
    data = dataclasses.replace(dataset, name=text, source=text)
    comparison = Comparison(config, [outcome.arm for outcome in outcomes], (0,))
    path, _ = write_report(comparison, data, outcomes, tmp_path, f"selbp compare {text}")
    found = Text(path.read_text())
    assert "script" not in found.tags and found.tags.count("img") == 3 and found.tags.count("b") == 0
    assert found.text.count(text.replace("\r", "\n").replace("\x00", "\ufffd")) >= 1 or name == "control"
    assert name != "formula" or (tmp_path / "seconds.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", NASTY)
def test_a_study_of_such_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = NASTY[name]
    if name != "formula":
        without_plots(monkeypatch)
    published = Path(__file__).parents[2] / "benchmarks" / "results" / "study-confirm.json"
    result = json.loads(published.read_text())
    clean = Text(study_page(result))
    result["protocol"]["title"] = result["protocol"]["note"] = result["machine"]["processor"] = text
    for entry in result["entries"]:
        if entry["arm"] == "cube-recut":
            entry["label"] = text
    costs = result["costs"]
    old = next(cost for cost in costs if "cube" in cost)
    costs[text] = costs.pop(old)
    for entry in result["entries"]:
        entry["cost"] = text if entry["cost"] == old else entry["cost"]
    (tmp_path / "study-x.json").write_text(json.dumps(result))
    markdown_ = document([read_result_file(tmp_path / "study-x.json")])
    tables = [[cells(line) for line in block.splitlines()] for block in markdown_.split("\n\n") if block[:2] == "| "]
    assert tables and all(len({len(row) for row in rows}) == 1 for rows in tables)
    assert "<" not in section(result).replace("\\<", "").replace("`<", "`") or name in ("script", "image", "quotes")
    found = Text(study_page(result))
    assert sorted(found.tags) == sorted(clean.tags)  # not one tag more or less than with ordinary names
