"""Rows of docs/versions.md, from what ran: called by the scripts that test other versions.

    python scripts/versions_table.py row VERSION PYTHON TESTS REPORT   prints a row, from pytest's --junitxml REPORT
    python scripts/versions_table.py write FILE SECTION                puts the rows of stdin into a section of FILE

A section keeps its rows of the versions that did not run this time; a row is known by its first cell, and by the Python
that ran it where a section names one.
"""

from __future__ import annotations

import datetime
import re
import sys
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

RUN = ("Python", "tests", "passed", "failed", "skipped", "what failed; why tests were skipped", "date")
HEADERS = {
    "torch": ("torch", *RUN),
    "Triton": ("Triton", *RUN),
    "frameworks": ("frameworks", *RUN),
    "compilers": ("compiler", "warnings of ours", "tests", "date"),
}
NAMED, LENGTH = 8, 80


def short(text: str, length: int = LENGTH) -> str:
    """In one line, without what would end a cell."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= length else line[: length - 3].rstrip() + "..."


def row(version: str, python: str, tests: str, report: Path) -> tuple[str, bool]:
    """The row of one run, and whether nothing failed."""
    today = datetime.date.today().isoformat()
    if not report.exists():
        return f"| {version} | {python} | {tests} | - | - | - | no test ran | {today} |", False
    failed, reasons, passed = [], Counter(), 0
    for case in xml.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif skipped is not None:
            message = skipped.get("message", "")
            if message == "collection skipped":  # of a whole file, whose reason stands in the text
                message = (skipped.text or "").partition("Skipped: ")[2].strip("')\" \n") or message
            reasons[short(message.partition(": ")[0])] += 1
        else:
            passed += 1
    # A parameter may be a whole object, and a reason go on with what torch said.
    said = [f"`{short(name)}`" for name in failed[:NAMED]]
    said += [f"{len(failed) - NAMED} more"] if len(failed) > NAMED else []
    said += [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]
    counts = f"{passed} | {len(failed)} | {sum(reasons.values())}"
    return f"| {version} | {python} | {tests} | {counts} | {'; '.join(said)} | {today} |", bool(passed) and not failed


def key(line: str, by_python: bool) -> tuple[str, tuple[int, ...], tuple[int, ...], str]:
    """Order rows by the name without figures and the version's parts, then by Python's minor release and its "t"."""
    cell, python = (part.strip() for part in line.split("|")[1:3])
    minor = re.match(r"(\d+)\.(\d+)[.\d]*(t?)", python) if by_python else None
    ran = (int(minor[1]), int(minor[2])) if minor else ()
    return re.sub(r"[\d.]+.*", "", cell), tuple(map(int, re.findall(r"\d+", cell))), ran, minor[3] if minor else ""


def write(text: str, section: str, rows: list[str]) -> str:
    """``text`` with these rows in its section, in place of those that start alike."""
    opening, closing = f"<!-- {section} -->", f"<!-- end of {section} -->"
    before, found, rest = text.partition(opening + "\n")
    body, ended, after = rest.partition(closing)
    if not found or not ended:
        raise SystemExit(f"versions_table: no section {opening} ... {closing}")
    head = HEADERS[section]
    by_python = head[1] == "Python"
    lines = {key(line, by_python): line for line in [*body.splitlines()[2:], *rows] if line.startswith("|")}
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(lines[name] for name in sorted(lines))]
    return before + opening + "\n" + "\n".join(table) + "\n" + closing + after


def main() -> int:
    """Run the command; returns the exit status."""
    match sys.argv[1:]:
        case ["row", version, python, tests, report]:
            line, passed = row(version, python, tests, Path(report))
            print(line)
            return 0 if passed else 1
        case ["write", file, section] if section in HEADERS:
            path = Path(file)
            path.write_text(write(path.read_text(), section, sys.stdin.read().splitlines()))
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
