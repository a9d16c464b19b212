"""The table's statistics, against scipy, and its text."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selbp_study.arms import Arm
from selbp_study.compare import Outcome
from selbp_study.config import RunConfig
from selbp_study.plots import bars_plot, curves_plot
from selbp_study.report import COLUMNS, plots_of
from selbp_study.table import HEADINGS, lines_of, markdown, rows_of
from selbp_study.timing import PARTS


def outcome(selector: str, seed: int, accuracy: float | None, error: str | None = None) -> Outcome:
    config = RunConfig(dataset="d", fingerprint="f", selector=selector, steps=10, lr=0.1, seed=seed)
    if accuracy is None:
        return Outcome(config, None, error, arm=Arm(selector))
    curve = [
        {"step": step, "accuracy": accuracy * step / 10, "backward_samples": 32 * step, "seconds": 0.1 * step}
        for step in (0, 5, 10)
    ]
    seconds = {phase: 0.5 + seed for phase in PARTS} | {"total": 3.0}
    result = {
        "config": config.as_dict(),
        "accuracy": accuracy,
        "steps": 10,
        "backward_samples": 320,
        "seconds": seconds,
        "curve": curve,
    }
    return Outcome(config, result, arm=Arm(selector))


RANDOM, TOP = [80.0, 81.5, 79.0, 80.5], [81.0, 83.0, 79.5, 81.0]
OUTCOMES = [outcome("random", seed, RANDOM[seed]) for seed in range(4)]
OUTCOMES += [outcome("top-loss", seed, TOP[seed]) for seed in range(4)]


def test_means_deviations_and_paired_intervals() -> None:
    baseline, line = lines_of(OUTCOMES)
    assert line.mean() == pytest.approx(np.mean(TOP)) and line.deviation() == pytest.approx(np.std(TOP, ddof=1))
    interval = stats.ttest_rel(TOP, RANDOM).confidence_interval(0.95)
    shown = f"{np.mean(TOP) - np.mean(RANDOM):+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    assert rows_of([baseline, line])[1][4] == shown


def test_pairs_are_by_seed_not_by_position() -> None:
    mixed = [*reversed(OUTCOMES[:4]), *OUTCOMES[4:]]
    assert rows_of(lines_of(mixed))[1][4] == rows_of(lines_of(OUTCOMES))[1][4]
    only_seed_3 = lines_of([OUTCOMES[3], *OUTCOMES[4:]])
    assert rows_of(only_seed_3)[1][4] == f"{TOP[3] - RANDOM[3]:+.2f}"
    assert rows_of(lines_of([OUTCOMES[0], OUTCOMES[5]]))[1][4] == "-"


def test_failures_are_lines_and_say_how_many_seeds_they_cost() -> None:
    failed = [
        outcome("matching", 0, None, "out of luck"),
        outcome("gradnorm", 0, 70.0),
        outcome("gradnorm", 1, None, "x"),
    ]
    lines = lines_of([*OUTCOMES, *failed])
    text = markdown(lines)
    assert "failed: seed 0: out of luck" in text and "70.00 (1 of 2 seeds failed)" in text
    rows = text.splitlines()
    assert len(rows) == 2 + 4 and len({len(row) for row in rows}) == 1
    assert len({row.count("|") for row in rows}) == 1 and all(len(row) == len(HEADINGS) for row in rows_of(lines))


def test_one_seed_has_no_deviation_and_no_interval() -> None:
    rows = rows_of(lines_of([OUTCOMES[0], OUTCOMES[4]]))
    assert rows[1][3] == "81.00" and rows[1][4] == "+1.00" and rows[0][4] == "-"


def test_without_random_there_is_no_difference() -> None:
    assert rows_of(lines_of(OUTCOMES[4:]))[0][4] == "-"


def test_the_page_explains_every_column_that_its_name_does_not() -> None:
    named = {heading.partition(",")[0] for heading in HEADINGS}
    assert named - set(COLUMNS) == {"arm", "keep", "lr", "test accuracy"} and not set(COLUMNS) - named


def test_curves_and_plots() -> None:
    lines = lines_of([*OUTCOMES, outcome("matching", 0, None, "no result")])
    curve = lines[1].curve("seconds")
    assert curve.x == [0.0, 0.5, 1.0] and curve.mean[-1] == pytest.approx(np.mean(TOP))
    assert curve.low[-1] == min(TOP) and curve.high[-1] == max(TOP)
    plots = plots_of("t", lines)
    assert set(plots) == {"samples", "seconds", "time"}
    assert all(png.startswith(b"\x89PNG") and len(png) > 5000 for png in plots.values())
    assert all(png.startswith(b"\x89PNG") for png in (curves_plot([], "s", "t"), bars_plot([])))
