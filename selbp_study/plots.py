"""The comparison's plots: curves with their names at their ends, colours that the colour-blind tell apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from selbp_study.table import PHASES, Line
from selbp_study.text import label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, and a dash of each line's own, so that neither alone has to carry the difference.
COLOURS = ("#000000", "#999999", "#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#8F5E15", "#7A3FA0")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (3, 1.5)), (0, (5, 1.5, 1, 1.5)), "-", (0, (8, 2, 2, 2)))
PHASE_COLOURS = {
    "score": "#F0E442",
    "select": "#D55E00",
    "forward": "#56B4E9",
    "backward": "#0072B2",
    "optimizer": "#BBBBBB",
}
Curve = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def mean_curve(line: Line, axis: str) -> Curve:
    """x, mean, lowest and highest accuracy over seeds at each evaluation; x is the mean over seeds too."""
    shortest = min(len(result["curve"]) for result in line.results)
    x = np.array([[point[axis] for point in result["curve"][:shortest]] for result in line.results], float)
    y = np.array([[point["accuracy"] for point in result["curve"][:shortest]] for result in line.results], float)
    return x.mean(0), y.mean(0), y.min(0), y.max(0)


def spread_labels(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions as near as may be to ``wanted``, in its order, at least ``gap`` apart, within [low, high]."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    gap = min(gap, (high - low) / max(1, len(order) - 1))
    positions = [min(max(wanted[index], low), high) for index in order]
    for index in range(1, len(positions)):
        positions[index] = max(positions[index], positions[index - 1] + gap)
    if positions:
        positions[-1] = min(positions[-1], high)
    for index in range(len(positions) - 2, -1, -1):
        positions[index] = min(positions[index], positions[index + 1] - gap)
    result = [0.0] * len(order)
    for place, index in enumerate(order):
        result[index] = positions[place]
    return result


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def png_of(figure: Any) -> bytes:
    """``figure`` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def new_figure(height: float) -> tuple[Any, Axes]:
    """A figure ``height`` inches high with one plot, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    return figure, figure.add_subplot()


def accuracy_plot(lines: Sequence[Line], axis: str, title: str) -> bytes:
    """PNG: test accuracy against ``axis``, ``"backward_samples"`` or ``"seconds"``; the band spans the seeds."""
    figure, axes = new_figure(4.8)
    ends: list[tuple[float, float, str, str]] = []
    finals, firsts = [], []
    for index, line in enumerate(lines):
        if not line.results:
            continue
        colour = COLOURS[index % len(COLOURS)]
        x, mean, low, high = mean_curve(line, axis)
        x = x / 1000 if axis == "backward_samples" else x
        style = DASHES[index % len(DASHES)]
        axes.plot(x, mean, color=colour, linestyle=style, linewidth=2, marker="o", markersize=3)
        axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        ends.append((float(x[-1]), float(mean[-1]), f"{label(line.label)} {mean[-1]:.1f}", colour))
        finals += [float(low.max()), float(high.max())]
        firsts.append(float(mean[1]) if len(mean) > 1 else float(mean[0]))
    if not ends:
        axes.text(0.5, 0.5, "no run finished", ha="center", transform=axes.transAxes)
        return png_of(figure)
    top = max(finals)
    bottom = max(min(firsts), top - 20)  # the untrained network's accuracy would flatten all the rest
    axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.06 * (top - bottom) + 0.01)
    axes.set_xlim(left=0)
    floor, ceiling = axes.get_ylim()
    right = max(end[0] for end in ends)
    places = spread_labels([end[1] for end in ends], 0.052 * (ceiling - floor), floor, ceiling)
    for (x_end, y_end, text, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            text,
            (x_end, y_end),
            (right * 1.03, place),
            color=colour,
            fontsize=10,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2},
        )
    units = {
        "backward_samples": "samples that ran backward (thousands)",
        "seconds": "seconds of training (processor time)",
    }
    axes.set_xlabel(units[axis])
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(title, loc="left", fontsize=11)
    _style(axes)
    return png_of(figure)


def time_plot(lines: Sequence[Line]) -> bytes:
    """PNG: milliseconds of a step, by phase."""
    lines = [line for line in lines if line.results]
    figure, axes = new_figure(0.9 + 0.42 * max(2, len(lines)))
    left, places = np.zeros(len(lines)), np.arange(len(lines))
    labels = [label(line.label) for line in lines]
    for phase in PHASES:
        width = np.array([1e3 * line.seconds(phase) / line.results[0]["steps"] for line in lines])
        bars = axes.barh(places, width, left=left, color=PHASE_COLOURS[phase], height=0.66, label=phase)
        shown = [f"{value:.1f}" if value > 0.06 * _longest(lines) else "" for value in width]
        dark = phase in ("backward", "select")
        axes.bar_label(bars, shown, label_type="center", fontsize=9, color="white" if dark else "black")
        left += width
    for place, total in enumerate(left):
        axes.text(total, place, f"  {total:.1f}", va="center", fontsize=10)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * float(left.max(initial=1e-9)))
    axes.set_xlabel("milliseconds a step (medians; processor time)")
    axes.legend(ncols=len(PHASES), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=10)
    _style(axes)
    axes.grid(visible=False)
    return png_of(figure)


def _longest(lines: Sequence[Line]) -> float:
    return max(1e3 * line.seconds("total") / line.results[0]["steps"] for line in lines)
