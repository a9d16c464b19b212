"""A study's plots: mean curves of the arms of a cell, and where the time of their steps goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from selbp_study.findings import Findings
from selbp_study.plots import COLOURS, DASHES, PHASE_COLOURS, _style, new_figure, png_of, spread_labels
from selbp_study.table import PHASES
from selbp_study.text import label

UNITS = {"steps": "optimizer steps", "samples": "samples that ran backward (thousands)", "seconds": "seconds"}


def curves_plot(findings: Findings, entries: Sequence[dict[str, Any]], axis: str, title: str) -> bytes:
    """PNG: mean test accuracy against steps, samples or seconds; only the ends are finished trainings."""
    figure, axes = new_figure(5.2)
    ends: list[tuple[float, float, str, str]] = []
    for index, entry in enumerate(entries):
        scale = {
            "steps": 1.0,
            "samples": entry["samples"] / entry["steps"] / 1e3,
            "seconds": findings.cost(entry)["median"] / 1e3,
        }[axis]
        steps, accuracy = np.array(entry["curve"], float)[1:].T
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(
            steps * scale,
            accuracy,
            color=colour,
            linestyle=DASHES[index % len(DASHES)],
            linewidth=1.8,
            marker="o",
            markersize=3,
        )
        ends.append(
            (float(steps[-1] * scale), float(accuracy[-1]), f"{label(entry['label'])} {accuracy[-1]:.1f}", colour)
        )
    values = [point[1] for entry in entries for point in entry["curve"][1:]]
    top, bottom = max(values), max(min(values), max(values) - 15)
    axes.set_ylim(bottom - 0.04 * (top - bottom) - 0.01, top + 0.06 * (top - bottom) + 0.01)
    axes.set_xlim(left=0)
    floor, ceiling = axes.get_ylim()
    places = spread_labels([end[1] for end in ends], 0.05 * (ceiling - floor), floor, ceiling)
    right = max(end[0] for end in ends)
    for (x, y, text, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            text,
            (x, y),
            (right * 1.03, place),
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2},
        )
    axes.set_xlabel(UNITS[axis])
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(label(title), loc="left", fontsize=11)
    _style(axes)
    return png_of(figure)


def split_plot(findings: Findings, entries: Sequence[dict[str, Any]]) -> bytes:
    """PNG: milliseconds of a step by phase, and those of the whole step beside them; medians."""
    figure, axes = new_figure(0.9 + 0.42 * max(2, len(entries)))
    labels, left = [label(entry["label"]) for entry in entries], np.zeros(len(entries))
    places = np.arange(len(entries))
    for phase in PHASES:
        width = np.array([findings.cost(entry)["phases"].get(phase, 0.0) for entry in entries])
        axes.barh(places, width, left=left, color=PHASE_COLOURS[phase], height=0.66, label=phase)
        left += width
    for place, entry in enumerate(entries):
        axes.text(left[place], place, f"  {findings.cost(entry)['median']:.2f}", va="center", fontsize=9)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * float(left.max(initial=1e-9)))
    axes.set_xlabel("milliseconds of processor time a step (medians)")
    axes.legend(ncols=len(PHASES), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=10)
    _style(axes)
    axes.grid(visible=False)
    return png_of(figure)
