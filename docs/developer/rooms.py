"""Draws rooms.svg, the picture of the package's rooms: ``python docs/developer/rooms.py``. A test checks the file."""

from __future__ import annotations

from pathlib import Path

# From the outside in; a room imports only from rooms in the lines below its own.
LINES = [
    [("selbp_study", "the study, real data, the command line"), ("benchmarks", "ours against peers and the roofline")],
    [("selbp.integrations", "other training frameworks")],
    [("selbp.training", "SelectiveBackprop: heads, losses, strategies, the report")],
    [("selbp.cut", "BackwardCut: choose inside the backward"), ("selbp.sampling", "choose before loading")],
    [("selbp.common", "what the step and the cut share: batches, hooks, guards")],
    [("selbp.rows", "backward through k rows of a forward on n"), ("selbp.selectors", "which rows, which weights")],
    [("selbp.ops", "one file per operator: schema, checks, backends")],
    [("selbp.reference", "the specification"), ("csrc", "native core, no torch"), ("triton_kernels", "Triton kernels")],
    [("selbp.types", "Selection, BatchStatistics, Matching")],
]
WIDTH, HEIGHT, GAP, MARGIN = 760, 50, 18, 10
INSTALLED = ("selbp.", "csrc", "triton_kernels")


def svg() -> str:
    """The picture."""
    parts = []
    height = 2 * MARGIN + len(LINES) * HEIGHT + (len(LINES) - 1) * GAP
    for i, line in enumerate(LINES):
        y = MARGIN + i * (HEIGHT + GAP)
        width = (WIDTH - 2 * MARGIN - (len(line) - 1) * GAP) / len(line)
        for j, (name, what) in enumerate(line):
            x = MARGIN + j * (width + GAP)
            kind = "room" if name.startswith(INSTALLED) else "beside"
            parts.append(f'<rect class="{kind}" x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="6"/>')
            parts.append(f'<text class="name" x="{x + width / 2:g}" y="{y + 21}">{name}</text>')
            parts.append(f'<text x="{x + width / 2:g}" y="{y + 39}">{what}</text>')
        if i:
            parts.append(f'<path d="M{WIDTH // 2} {y - GAP + 2} v{GAP - 7}" marker-end="url(#tip)"/>')
    body = "\n".join(parts)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img"
 font-family="sans-serif" font-size="13" text-anchor="middle">
<title>The rooms of selbp; each imports only from the lines below its own</title>
<style>
rect {{ stroke: #4a6fa5; stroke-width: 1.2 }} .room {{ fill: #e8f0fb }} .beside {{ fill: #f6f1e4; stroke: #a58a4a }}
text {{ fill: #223 }} .name {{ font-weight: bold; font-family: monospace }}
path {{ stroke: #667; stroke-width: 1.5; fill: none }}
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">
<path d="M1 1 L7 4 L1 7"/></marker></defs>
{body}
</svg>
"""


if __name__ == "__main__":
    Path(__file__).with_name("rooms.svg").write_text(svg())
