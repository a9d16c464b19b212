"""What a table of scores learned in a run: samples thought mislabelled, as CSV and as a page to look at.

The page also plots headroom and noise share over the training. Headroom says how much choosing could gain at most, as a
factor on the batch; see :class:`selbp.AutoSelect`.
"""

from __future__ import annotations

import csv
import html
import io
from pathlib import Path
from typing import Any

import torch

from selbp.sampling import ScoreTable
from selbp_study.data import Dataset
from selbp_study.page import embedded, page
from selbp_study.plots import new_figure, png_of
from selbp_study.storage import write_text

LIKELY = 0.5  # P(mislabelled) from which a sample is listed
SHOWN = 48  # of them on the page


def write(folder: Path, table: ScoreTable, data: Dataset, rows: list[dict[str, Any]], *, with_page: bool) -> list[Path]:
    """Write ``suspects.csv``, and ``scores.html`` where ``with_page``; return the paths. ``rows`` are the run's log."""
    listed = table.suspects(len(table))
    lines = [
        (number, given, probable, chance)
        for number, given, probable, chance in zip(*(column.tolist() for column in listed), strict=True)
        if chance >= LIKELY
    ]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["id", "given_label", "probable_label", "probability"])
    writer.writerows([number, given, probable, f"{chance:.4f}"] for number, given, probable, chance in lines)
    written = [folder / "suspects.csv"]
    write_text(written[0], text.getvalue())
    if with_page:
        written.append(folder / "scores.html")
        write_text(written[1], _page(table, data, rows, lines))
    return written


def _page(table: ScoreTable, data: Dataset, rows: list[dict[str, Any]], lines: list[tuple[Any, ...]]) -> str:
    known = [row for row in rows if row.get("headroom") is not None]
    plot = embedded(_curves(known), "headroom and noise share over the training") if known else ""
    samples = "".join(_sample(data, *line) for line in lines[:SHOWN])
    listed = f"""<h2>The {min(SHOWN, len(lines))} most suspect samples</h2>
<p>All of them are in suspects.csv: number, given label, probable label, probability.</p>
<div class="samples">{samples}</div>"""
    body = f"""<h1>What the scores of {html.escape(data.name)} say</h1>
<p class="lead">{len(lines)} of {len(table)} samples are thought mislabelled (probability at least {LIKELY:g}). The
noise share is {table.noise_share:.1%}, headroom {table.headroom:.2f}: choosing can pay where it exceeds its price.</p>
{plot}{listed if lines else ""}"""
    return page(f"selbp: scores of {data.name}", [body])


def _sample(data: Dataset, number: int, given: int, probable: int, chance: float) -> str:
    caption = f"{number}: given {given}, probably {probable} ({chance:.0%})"
    pixels = data.train.inputs[number]
    return embedded(_image(pixels), caption) if pixels.dim() == 2 else f"<figure>{html.escape(caption)}</figure>"


def _image(pixels: torch.Tensor) -> bytes:
    from matplotlib import image

    out = io.BytesIO()
    image.imsave(out, pixels.numpy(), cmap="gray", format="png")
    return out.getvalue()


def _curves(rows: list[dict[str, Any]]) -> bytes:
    figure, axes = new_figure(3.2)
    steps = [row["step"] for row in rows]
    axes.plot(steps, [row["headroom"] for row in rows], color="#0072B2", label="headroom")
    axes.axhline(1.0, color="#BBBBBB", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("headroom")
    other = axes.twinx()
    other.plot(steps, [100 * (row["noise_share"] or 0.0) for row in rows], color="#D55E00", label="noise share, %")
    other.set_ylabel("noise share, %")
    other.set_ylim(bottom=0)
    handles = [*axes.lines[:1], *other.lines]
    axes.legend(handles=handles, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=10)
    return png_of(figure)
