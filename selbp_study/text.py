"""Text that others chose (names of arms, data sets, folders; errors), made safe for the pages that show it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

MARKS = re.compile(r"([\\`*|<>&\[\]])")  # what Markdown, or a page that embeds it, would take as more than a letter
ESCAPED = re.compile(r"\\([\\`*|<>&\[\]])")


def one_line(text: object) -> str:
    """``text`` without line breaks and control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def plain(text: object) -> str:
    """``text`` for a paragraph or a table's cell in Markdown: one line, every mark of Markdown and HTML escaped."""
    return MARKS.sub(r"\\\1", one_line(text))


def code(text: object) -> str:
    """``text`` as code in a table's cell: there a backslash escapes the bar alone, and a backtick cannot stand."""
    inside = one_line(text).replace("`", "'").replace("|", "\\|")
    return f"`{inside}`"


def label(text: object) -> str:
    """``text`` for a plot: matplotlib would set what is between two dollars as a formula."""
    return one_line(text).replace("$", r"\$")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, aligned: bool = False) -> str:
    """A table in Markdown; the first column left-aligned, the others right. ``aligned`` pads the cells."""
    lines = [head, *rows]
    widths = [max(len(row[column]) for row in lines) if aligned else 0 for column in range(len(head))]

    def text(row: Sequence[str]) -> str:
        sides = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return f"| {' | '.join([row[0].ljust(widths[0]), *sides])} |"

    rule = ["-" * max(3, widths[0] + 2), *("-" * max(3, width + 1) + ":" for width in widths[1:])]
    return "\n".join([text(head), f"|{'|'.join(rule)}|", *map(text, lines[1:])])


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table; an escaped bar is a part of its cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def inline(text: str) -> str:
    """HTML of a piece of Markdown with bold text, code and escaped marks."""
    kept: list[str] = []

    def keep(content: str) -> str:
        kept.append(content)
        return f"\0{len(kept) - 1}\0"

    text = re.sub(
        r"(?<!\\)`([^`]*)`", lambda m: keep(f"<code>{html.escape(m[1].replace(chr(92) + '|', '|'))}</code>"), text
    )
    text = ESCAPED.sub(lambda m: keep(html.escape(m[1])), text)
    text = re.sub(r"\*\*(.*?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], text)
