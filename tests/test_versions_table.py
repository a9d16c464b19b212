"""The page of what the tests ran on is made of what ran: counts, failures and reasons of pytest's own report."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TODAY = datetime.date.today().isoformat()
REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_gram" name="test_a"/>
<testcase classname="tests.ops.test_gram" name="test_b[1|2]"><failure message="no"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_c"><error message="no"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_d"><skipped message="no GPU: none is there"/></testcase>
<testcase classname="tests.ops.test_gram" name="test_e"><skipped message="no GPU: nor here"/></testcase>
<testcase name="tests.x"><skipped message="collection skipped">('x', 1, 'Skipped: y is missing')</skipped></testcase>
</testsuite></testsuites>"""


def script(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "versions_table.py"), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True)


def test_a_row_counts_what_ran(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    done = script("row", "2.6.0", "3.11.7", "all", tmp_path / "report.xml")
    cells = [cell.strip() for cell in done.stdout.strip("|\n ").split("|")]
    assert cells[:6] == ["2.6.0", "3.11.7", "all", "1", "2", "3"] and cells[-1] == TODAY
    assert cells[6] == ("`test_gram::test_b[1/2]`; `test_gram::test_c`; 2 skipped: no GPU; 1 skipped: y is missing")
    assert done.returncode == 1
    (tmp_path / "report.xml").write_text("<t><testcase classname='a' name='b'/></t>")
    assert script("row", "2.6.0", "3.11.7", "all", tmp_path / "report.xml").returncode == 0


def test_a_run_that_left_no_report_has_failed(tmp_path: Path) -> None:
    done = script("row", "2.6.0", "3.11.7", "all", tmp_path / "none.xml")
    assert done.returncode == 1 and "no test ran" in done.stdout


def test_a_section_keeps_what_did_not_run_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- compilers -->\n<!-- end of compilers -->\nafter\n")
    for rows in ("| g++ 11.3.0 | old |\n| g++ 9.3.0 | kept |\n", "| g++ 11.3.0 | new |\n| clang++ 14.0.6 | new |\n"):
        assert script("write", page, "compilers", stdin=rows).returncode == 0
    *head, first, second, third, end, after = page.read_text().splitlines()
    assert [first, second, third] == ["| clang++ 14.0.6 | new |", "| g++ 9.3.0 | kept |", "| g++ 11.3.0 | new |"]
    assert head[0] == "before" and end == "<!-- end of compilers -->" and after == "after"


def test_each_python_has_a_row_of_its_own(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- torch -->\n<!-- end of torch -->\n")
    rows = ["| 2.13.0 | 3.14.7t | a |", "| 2.13.0 | 3.9.1 | a |", "| 2.6.0 | 3.11.7 | a |", "| 2.13.0 | 3.14.7 | a |"]
    assert script("write", page, "torch", stdin="\n".join(rows)).returncode == 0
    assert script("write", page, "torch", stdin="| 2.13.0 | 3.14.8 | b |\n").returncode == 0
    assert page.read_text().splitlines()[3:-1] == [rows[2], rows[1], "| 2.13.0 | 3.14.8 | b |", rows[0]]


@pytest.mark.parametrize("section", ["torch", "Triton", "compilers"])
def test_the_page_has_its_sections(section: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = (ROOT / "docs" / "versions.md").read_text()
    page.write_text(text)
    assert script("write", page, section).returncode == 0
    assert page.read_text() == text
