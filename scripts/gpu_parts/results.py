"""Rows of a part's results: written after each one, so that a part that is cut off goes on where it ended."""

from __future__ import annotations

import json
import os
import pathlib
import traceback
from collections.abc import Callable
from typing import Any


class Results:
    """``part.json`` in a folder; ``share`` of ``shares`` processes that do one part together."""

    def __init__(self, folder: pathlib.Path, part: str, share: int = 0, shares: int = 1) -> None:
        self.part, self.share, self.shares = part, share, shares
        self.path = folder / (f"{part}.json" if shares == 1 else f"{part}.{share}.json")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, dict[str, Any]] = {}
        self.complete: dict[str, bool] = {}  # units of work -> whether they came to their end
        self._met = 0  # units that this part has named so far; they are dealt to its processes in turn
        for path in (folder / f"{part}.json", self.path):  # the part's own, of which a share knows what is whole
            if path.exists():
                written = json.loads(path.read_text())
                self.complete |= {name: True for name, whole in written["complete"].items() if whole}
                self.rows = written["rows"] if path == self.path else {}

    def row(self, unit: str, work: Callable[[], None]) -> None:
        """Run one unit of work, unless it is another process's or whole already; an error is a row that failed."""
        mine = self._met % self.shares == self.share
        self._met += 1
        if not mine or self.complete.get(unit):
            return
        self.complete[unit] = False
        self.rows.pop(f"{unit}: error", None)
        try:
            work()
            self.complete[unit] = True
        except Exception as error:
            self.add(f"{unit}: error", False, detail=f"{type(error).__name__}: {str(error)[:400]}")
            traceback.print_exc()
        self.write()

    def add(self, name: str, good: bool | None, **figures: Any) -> None:
        """One row: whether it is as it must be, None where that is not judged."""
        self.rows[name] = {"good": good, **figures}
        shown = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        print(f"{'    ' if good is None else 'ok  ' if good else 'FAIL'} {name}: {shown}", flush=True)
        self.write()

    def write(self) -> None:
        """The file, whole or not at all."""
        text = json.dumps({"part": self.part, "complete": self.complete, "rows": self.rows}, indent=1)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(text)
        os.replace(scratch, self.path)

    def merge(self, shares: int) -> None:
        """Take the rows of ``shares`` processes, and leave one file."""
        for share in range(shares):
            other = Results(self.path.parent, self.part, share, shares)
            self.rows |= other.rows
            self.complete |= other.complete
        for unit, whole in self.complete.items():
            if whole:
                self.rows.pop(f"{unit}: error", None)  # of an earlier run
        self.write()
        for share in range(shares):
            self.path.with_name(f"{self.part}.{share}.json").unlink(missing_ok=True)

    @property
    def failed(self) -> list[str]:
        """Names of the rows that are not as they must be."""
        return [name for name, row in self.rows.items() if row["good"] is False]

    def markdown(self) -> str:
        """A table of the rows, with a column for each figure."""
        columns = list(dict.fromkeys(key for row in self.rows.values() for key in row if key != "good"))
        lines = [f"## {self.part}", "", f"| row | good | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
        for name, row in self.rows.items():
            cells = [_shown(row[key]).replace("|", "/").replace("\n", " ") if key in row else "" for key in columns]
            good = {True: "yes", False: "NO", None: ""}[row["good"]]
            lines.append(f"| {name.replace('|', '/')} | {good} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
