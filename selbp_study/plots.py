"""The plots: curves, which a legend lists from the best end down, and bars of a step's parts.

Curves differ by marker and dash as well as by colour, so that they can be told apart without it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from selbp_study.text import label, one_line
from selbp_study.timing import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette and two more. The cycles' lengths have no common factor but five: 70 curves differ, and 35 of
# them without colour.
COLOURS = ("#000000", "#999999", "#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#56B4E9", "#8F5E15", "#7A3FA0")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (9, 2, 2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "X", "P")
PART_COLOURS = dict(zip(PARTS, ("#F0E442", "#D55E00", "#56B4E9", "#0072B2", "#BBBBBB"), strict=True))
SPAN = 20  # points of accuracy that a plot shows at most: an untrained network's would flatten all the rest


class Curve(NamedTuple):
    """Mean test accuracies in per cent at the places ``x``, and the range of the seeds, where that is known."""

    name: str
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


class Bars(NamedTuple):
    """Milliseconds of a step's parts, and of the whole step: a median of its own, not their sum."""

    name: str
    parts: dict[str, float]
    whole: float


def curves_plot(curves: Sequence[Curve], unit: str, title: str) -> bytes:
    """PNG: test accuracy against ``unit``; only the ends are finished trainings."""
    lines = sum(_wrapped(curve.name).count("\n") + 1 for curve in curves)  # of the legend
    figure, axes = new_figure(max(5.2, 0.9 + 0.22 * lines))
    if not curves:
        axes.text(0.5, 0.5, "no run finished", ha="center", transform=axes.transAxes)
        return png_of(figure)
    for index, curve in enumerate(curves):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        dash, name = DASHES[index % len(DASHES)], f"{_wrapped(curve.name)}  {curve.mean[-1]:.2f}"
        axes.plot(
            curve.x, curve.mean, color=colour, linestyle=dash, linewidth=1.6, marker=marker, markersize=4.5, label=name
        )
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.12, linewidth=0)
    trained = [value for curve in curves for value in curve.mean[1:] or curve.mean]
    top = max([*trained, *(value for curve in curves for value in curve.high)])
    bottom = max(min(trained), top - SPAN)
    axes.set_ylim(bottom - 0.04 * (top - bottom) - 0.01, top + 0.06 * (top - bottom) + 0.01)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit)
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(label(title), loc="left", fontsize=11)
    from_the_best = sorted(zip(curves, axes.lines, strict=True), key=lambda pair: pair[0].mean[-1], reverse=True)
    axes.legend(
        handles=[line for _, line in from_the_best],
        title="test accuracy at the end (%)",
        loc="upper left",
        bbox_to_anchor=(1, 1),
        frameon=False,
        fontsize=9,
        handlelength=4,
        alignment="left",
    )
    _style(axes)
    return png_of(figure)


def bars_plot(steps: Sequence[Bars]) -> bytes:
    """PNG: milliseconds of a step by its parts, and those of the whole step beside them."""
    lines = max((_wrapped(step.name).count("\n") + 1 for step in steps), default=1)
    figure, axes = new_figure(0.9 + max(0.42, 0.2 * lines) * max(2, len(steps)))
    left, places = [0.0] * len(steps), range(len(steps))
    longest = max((step.whole for step in steps), default=0.0)
    for part, colour in PART_COLOURS.items():
        width = [step.parts.get(part, 0.0) for step in steps]
        bars = axes.barh(places, width, left=left, color=colour, height=0.66, label=part)
        shown = [f"{value:.1f}" if value > 0.06 * longest else "" for value in width]
        dark = part in ("backward", "select")
        axes.bar_label(bars, shown, label_type="center", fontsize=9, color="white" if dark else "black")
        left = [begin + more for begin, more in zip(left, width, strict=True)]
    for place, step in enumerate(steps):
        axes.text(left[place], place, f"  {step.whole:.2f}", va="center", fontsize=9)
    axes.set_yticks(places, [_wrapped(step.name) for step in steps])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(left, default=0.0) or 1.0)
    axes.set_xlabel("milliseconds of processor time a step (medians)")
    axes.legend(ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=10)
    _style(axes)
    axes.grid(visible=False)
    return png_of(figure)


def new_figure(height: float) -> tuple[Any, Axes]:
    """A figure ``height`` inches high with one plot, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
    return figure, figure.add_subplot()


def png_of(figure: Any) -> bytes:
    """``figure`` as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _wrapped(name: str) -> str:
    """``name`` in lines that leave most of the width to the curves."""
    return "\n".join(map(label, textwrap.wrap(one_line(name), 30)))


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
