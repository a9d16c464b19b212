"""The pages of the documentation: their code runs, their links lead somewhere, their figures are those measured."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from selbp_study.arms import Arm
from selbp_study.parsers import build_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.S | re.M)  # "```python notest" is shown and not run
COMMAND = re.compile(r"^(?:torchrun .* -m selbp_study|selbp) ((?:train|compare|study|info)\b[^#\n]*)", re.M)
FRAGMENTS = {  # pages whose blocks are parts of a program of the reader's
    "rows.md",
    "guides/backward_through_rows.md",
    "developer/rows.md",
    "guides/frameworks.md",
}


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


RUN = [page for page in PAGES if BLOCK.search(page.read_text()) and name_of(page) not in FRAGMENTS]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_its_blocks_run_in_order(page: Path) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for i, block in enumerate(BLOCK.findall(page.read_text())):
        exec(compile(block, f"{name_of(page)}, block {i}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_its_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), f"{name_of(page)}: {link}"


def test_its_commands_are_understood() -> None:
    pages = [*PAGES, ROOT / "README.md"]
    commands = [command for page in pages for command in COMMAND.findall(page.read_text())]
    assert len(commands) >= 4
    for command in commands:
        arguments = build_parser().parse_args(shlex.split(command))  # exits where it is not understood
        for arm in getattr(arguments, "arms", None) or []:
            Arm.parse(arm)


def test_the_benchmarks_are_those_that_were_published() -> None:
    name = "benchmarks/results/bench.md"
    page = (DOCS / "measurements" / "benchmarks.md").read_text()
    between = page.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    assert between.strip() == (ROOT / name).read_text().strip()


def test_the_picture_of_the_rooms_is_drawn() -> None:
    spec = importlib.util.spec_from_file_location("rooms", DOCS / "developer" / "rooms.py")
    rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rooms)
    assert (DOCS / "developer" / "rooms.svg").read_text() == rooms.svg(), "run: python docs/developer/rooms.py"


def test_what_is_said_of_the_study_is_in_it() -> None:
    """Each difference in the guide on choosing a rule, with its interval where it has one, is in the study's page."""
    guide, study = ((DOCS / name).read_text() for name in ("guides/choosing_a_rule.md", "measurements/study.md"))
    number = r"[-+]\d+\.\d\d"
    found = re.findall(rf"(?<!\[)(?<!, )({number})\**( \[{number}, {number}\])?", guide)
    assert len(found) >= 16 and sum(bool(interval) for _, interval in found) == 55
    for difference, interval in found:
        assert difference + (interval or " [") in study, difference + interval
