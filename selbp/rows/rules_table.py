"""Write the table of operators in ``docs/measurements/rows.md`` from the rules.

Run ``python -m selbp.rows.rules_table docs/measurements/rows.md`` to bring it up to date.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from selbp.rows.registry import TABLE

BEGIN, END = "<!-- rules: begin (generated) -->", "<!-- rules: end -->"


def table() -> str:
    """Return a Markdown table with one line per file of rules and condition."""
    lines: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in TABLE:
        names = lines[entry.family, entry.when]
        if f"`{entry.name}`" not in names:
            names.append(f"`{entry.name}`")
    head = ["| rules in | operators (`torch.ops.aten`) | run on k rows when |", "|---|---|---|"]
    body = [f"| `{family}` | {', '.join(names)} | {when} |" for (family, when), names in sorted(lines.items())]
    return "\n".join(head + body)


def insert(text: str) -> str:
    """Return ``text`` with the current table between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(insert(path.read_text()))
