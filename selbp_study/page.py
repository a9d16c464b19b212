"""A page that needs nothing but itself: HTML of the Markdown that the studies write, with its pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable

from selbp_study.text import cells, inline

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1080px; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.2rem; margin-top: 2rem }
p, li, dd { max-width: 48rem } .lead { color: #444; margin-top: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .55rem; text-align: right; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888; vertical-align: bottom } td { white-space: nowrap }
th:first-child, td:first-child { text-align: left } td.failed { color: #a40000; text-align: left; white-space: normal }
img { width: 100%; height: auto; max-width: 900px } figure { margin: 1.2rem 0 } figcaption { color: #444 }
dt { font-weight: 600; margin-top: .5rem } dd { margin-left: 1.2rem } code { background: #f3f3f3; padding: 0 .25em }
.note { border-left: 4px solid #E69F00; padding: .2rem 1rem; background: #fdf6e8 }
.samples { display: flex; flex-wrap: wrap; gap: .5rem } .samples figure { width: 7rem; margin: 0 }
.samples img { width: 100%; image-rendering: pixelated }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """One file, no scripts, nothing loaded from elsewhere; ``parts`` are HTML."""
    body = "\n".join(parts)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
{body}
</body></html>
"""


def embedded(png: bytes, caption: str) -> str:
    """A figure of a page, which holds the picture itself."""
    image, text = base64.b64encode(png).decode(), html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{image}"><figcaption>{text}</figcaption></figure>'


def to_html(markdown: str) -> str:
    """The few forms of Markdown that the studies write, as HTML."""

    def table_cell(cell: str) -> str:
        return f'<td class="failed">{inline(cell)}</td>' if cell.startswith("failed") else f"<td>{inline(cell)}</td>"

    parts = []
    for block in markdown.split("\n\n"):
        lines = block.split("\n")
        if block.startswith("#"):
            level = len(block) - len(block.lstrip("#"))
            parts.append(f"<h{level}>{inline(block.lstrip('# '))}</h{level}>")
        elif block.startswith("|"):
            head, *rows = [cells(line) for line in lines if line and not line.startswith("|---")]
            heads = "".join(f"<th>{inline(cell)}</th>" for cell in head)
            body = "".join(f"<tr>{''.join(map(table_cell, row))}</tr>" for row in rows)
            table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            parts.append(f'<div class="wide">{table}</div>')
        elif block.startswith("* "):
            parts.append(f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>")
        else:
            parts.append(f"<p>{inline(block)}</p>")
    return "\n".join(parts)
