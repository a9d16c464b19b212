"""What the plots show, and that nothing of it is cut off or lies on the curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from selbp_study import plots, suspects
from selbp_study.plots import Bars, Curve, bars_plot, curves_plot
from selbp_study.timing import PARTS


def drawn(monkeypatch: pytest.MonkeyPatch, plot: Callable[..., bytes], *args: Any) -> Any:
    """The figure that ``plot`` draws."""
    figures: list[Any] = []
    for module in (plots, suspects):
        monkeypatch.setattr(module, "png_of", lambda figure: figures.append(figure) or b"")
    plot(*args)
    figures[0].canvas.draw()
    return figures[0]


def whole(figure: Any) -> bool:
    """Whether nothing that belongs to the plot lies beyond the figure's edge."""
    tight, size = figure.get_tightbbox(), figure.get_size_inches()
    return tight.x0 >= -1e-6 and tight.y0 >= -1e-6 and tight.x1 <= size[0] + 1e-6 and tight.y1 <= size[1] + 1e-6


NAMES = ["short", "ends early", "a rule with many options (ridge=0.01, weights=refit, precision=bfloat16)", "$a_b", ""]


def test_the_legend_lists_the_curves_from_the_best_end_down(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [80.0, 90.65, 85.0, 88.0, 70.0]
    named = enumerate(zip(NAMES, ends, strict=True))
    curves = [Curve(name, [0, 1 + i, 2 + 9 * i], [10, 60, end]) for i, (name, end) in named]
    figure = drawn(monkeypatch, curves_plot, curves, "seconds", "title")
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [float(text.split()[-1]) for text in texts] == sorted(ends, reverse=True)
    assert texts[0] == "ends early  90.65" and "\n" in texts[2]
    # What is not a curve, its band or the grid stays beside the axes, and within the figure.
    assert not axes.texts and whole(figure)
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


@pytest.mark.parametrize("count", [1, 7, 35])
def test_curves_differ_without_colour_and_all_are_listed(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    curves = [Curve(f"rule {index}", [0, 1], [10, 60 + index]) for index in range(count)]
    figure = drawn(monkeypatch, curves_plot, curves, "steps", "title")
    lines = figure.axes[0].lines
    assert len({(line.get_marker(), repr(line._dash_pattern)) for line in lines}) == len(lines) == count
    assert len(figure.axes[0].get_legend().get_texts()) == count and whole(figure)


def test_bars_stay_within_their_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [Bars(name, dict.fromkeys(PARTS, 1.0 + index), 5.0 + index) for index, name in enumerate(NAMES)]
    assert whole(drawn(monkeypatch, bars_plot, steps))


def test_the_legend_of_the_scores_is_above_the_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"step": step, "headroom": 2.0, "noise_share": 0.2} for step in range(0, 100, 10)]
    figure = drawn(monkeypatch, suspects._curves, rows)
    axes, _ = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["headroom", "noise share, %"]
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 and whole(figure)
