"""Comparisons: failures stay single, runs are cached by configuration, tuning never sees the test part."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from selbp_study.arms import Arm
from selbp_study.compare import Comparison, run_all, run_folder, tune
from selbp_study.config import RunConfig
from selbp_study.costs import ONCE, Cost
from selbp_study.data import Dataset, Split
from selbp_study.report import write_report
from selbp_study.run import Run
from selbp_study.text import ESCAPED, cells

ARMS = [Arm("full"), Arm("random"), Arm("matching", lr=0.03)]


@pytest.fixture
def comparison(config: RunConfig) -> Comparison:
    return Comparison(dataclasses.replace(config, selector="random", steps=8, evaluate_every=4), ARMS, (0, 1))


class Prices(dict[str, float]):
    """Milliseconds of a step by the rule, and those that each arm pays ``once``."""

    def __getitem__(self, config: RunConfig) -> Cost:
        return Cost(*[super().__getitem__(config.selector)] * 3, {ONCE: self.get("once", 0.0)})


def test_arms_and_budgets(comparison: Comparison) -> None:
    runs = list(comparison.runs())
    assert [(arm.selector, run.seed) for arm, run in runs[:4]] == [
        ("full", 0),
        ("random", 0),
        ("matching", 0),
        ("full", 1),
    ]
    assert [run.keep for _, run in runs[:3]] == [1.0, 0.25, 0.25] and runs[2][1].lr == 0.03
    assert {run.steps for _, run in runs} == {8}
    samples = dataclasses.replace(comparison, budget="samples")
    assert [run.steps for _, run in samples.runs()][:3] == [2, 8, 8]  # 64 samples backward each
    timed = comparison.timed(Prices(full=6.0, random=1.5, matching=3.0))  # 8 steps of matching: 24 ms
    assert [run.steps for _, run in timed.runs()][:3] == [4, 16, 8] and timed.budget == "time"
    charged = comparison.timed(Prices(full=6.0, random=1.5, matching=3.0, once=12.0))
    assert [run.steps for _, run in charged.runs()][:3] == [2, 8, 4]
    assert Arm("matching:ridge=0.1").label == "gradient matching (ridge=0.1)"
    for change in ({"arms": []}, {"seeds": ()}, {"budget": "money"}, {"arms": [ARMS[0]] * 2}, {"seeds": (1, 1)}):
        with pytest.raises(ValueError, match="arm|seed|budget"):
            dataclasses.replace(comparison, **change)


def test_a_failed_arm_takes_no_other_with_it(
    tmp_path: Path, dataset: Dataset, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_to_end = Run.train_step

    def fails(self: Run):
        if self.config.selector == "random" and self.config.seed == 0:
            raise RuntimeError("bad luck")
        return run_to_end(self)

    monkeypatch.setattr(Run, "train_step", fails)
    outcomes = run_all(comparison, dataset, tmp_path)
    assert [outcome.error for outcome in outcomes] == [None, "RuntimeError: bad luck", None, None, None, None]
    failed = run_folder(tmp_path, outcomes[1].arm, outcomes[1].config)
    assert "bad luck" in (failed / "error.txt").read_text() and "Traceback" in (failed / "error.txt").read_text()
    page, table = write_report(comparison, dataset, outcomes, tmp_path, "selbp compare")
    assert "1 of 2 seeds failed" in table and "bad luck" in page.read_text()
    monkeypatch.setattr(Run, "train_step", run_to_end)
    again = run_all(comparison, dataset, tmp_path)  # the failed run is tried again, the others are read
    assert [outcome.cached for outcome in again] == [True, False, True, True, True, True]
    assert all(outcome.result for outcome in again)


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    tmp_path: Path, dataset: Dataset, comparison: Comparison
) -> None:
    def interrupting(config: RunConfig, _done: int):
        left = [5]

        def advance(_samples: int, _loss: float) -> None:
            left[0] -= 1
            if config.selector == "random" and left[0] == 0:
                raise KeyboardInterrupt

        return advance

    whole = run_all(comparison, dataset, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_all(comparison, dataset, tmp_path / "parts", progress=interrupting)
    starts: list[tuple[str, int]] = []

    def note(config: RunConfig, done: int):
        starts.append((config.selector, done))
        return lambda _samples, _loss: None

    parts = run_all(comparison, dataset, tmp_path / "parts", progress=note)
    assert starts[0] == ("random", 5) and [done for _, done in starts[1:]] == [0] * 4  # the first was finished
    for a, b in zip(whole, parts, strict=True):
        assert a.result and b.result and a.result["accuracy"] == b.result["accuracy"]


def test_arms_train_in_turn_and_end_as_each_does_alone(
    tmp_path: Path, dataset: Dataset, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = dataclasses.replace(
        comparison,
        base=dataclasses.replace(comparison.base, steps=25, evaluate_every=7),
        arms=[*ARMS, Arm("loss-percentile")],
        seeds=(0,),
    )
    order: list[str] = []
    drawn: dict[str, list[list[float]]] = {}
    train_step = Run.train_step

    def noting(self: Run) -> None:
        order.append(self.config.selector)
        drawn.setdefault(self.config.selector, []).append(torch.rand(3).tolist())  # as dropout does
        train_step(self)

    monkeypatch.setattr(Run, "train_step", noting)
    together = run_all(comparison, dataset, tmp_path / "together")
    names = [arm.selector for arm in comparison.arms]
    assert order == [name for turn in (10, 10, 5) for name in names for _ in range(turn)]
    in_turn = dict(drawn)
    drawn.clear()
    for outcome in together:
        run = Run(outcome.config, dataset, tmp_path / "alone" / outcome.arm.selector)
        run.open()
        run.execute()
        mine, theirs = (
            torch.load(folder / "model.pt", weights_only=True)
            for folder in (run.folder, run_folder(tmp_path / "together", outcome.arm, outcome.config))
        )
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert drawn == in_turn


def test_a_comparison_that_is_stopped_in_the_middle_of_turns_resumes_every_arm(
    tmp_path: Path, dataset: Dataset, comparison: Comparison
) -> None:
    comparison = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, steps=25), seeds=(0,))

    def stopping(config: RunConfig, _done: int):
        left = [13]

        def advance(_samples: int, _loss: float) -> None:
            left[0] -= 1
            if config.selector == "random" and left[0] == 0:
                raise KeyboardInterrupt

        return advance

    whole = run_all(comparison, dataset, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_all(comparison, dataset, tmp_path / "parts", progress=stopping)
    starts: list[int] = []
    parts = run_all(
        comparison,
        dataset,
        tmp_path / "parts",
        progress=lambda _config, done: starts.append(done) or (lambda _samples, _loss: None),
    )
    assert starts == [20, 13, 10]
    assert [one.result["accuracy"] for one in parts] == [one.result["accuracy"] for one in whole]


def test_the_cache_follows_the_configuration_and_the_data(
    tmp_path: Path, dataset: Dataset, comparison: Comparison
) -> None:
    comparison = dataclasses.replace(comparison, arms=ARMS[1:2], seeds=(0,))
    assert not run_all(comparison, dataset, tmp_path)[0].cached
    assert run_all(comparison, dataset, tmp_path)[0].cached
    for change in ({"lr": 0.2}, {"fingerprint": "other"}, {"steps": 9}, {"weight_decay": 0.0}):
        arms = [Arm("random", lr=change.get("lr"))]
        changed = dataclasses.replace(comparison, base=dataclasses.replace(comparison.base, **change), arms=arms)
        assert not run_all(changed, dataset, tmp_path)[0].cached


def test_two_arms_of_one_configuration_train_once(
    tmp_path: Path, dataset: Dataset, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms, begun = [Arm("random"), Arm("random", keep=0.25)], list[RunConfig]()
    monkeypatch.setattr(Run, "open", lambda self, open=Run.open: begun.append(self.config) or open(self))
    outcomes = run_all(dataclasses.replace(comparison, arms=arms, seeds=(0,)), dataset, tmp_path)
    assert len(begun) == 1 and [outcome.arm.name for outcome in outcomes] == ["random", "random@keep=0.25"]
    assert outcomes[0].result == outcomes[1].result is not None


class Forbidden(Split):
    """A test part that may not be looked at."""

    def __getattribute__(self, name: str):
        if name in ("images", "labels", "batch", "take", "to", "__len__"):
            raise AssertionError(f"the test part was read: {name}")
        return super().__getattribute__(name)

    def __len__(self) -> int:
        raise AssertionError("the test part was read: len")


def test_tuning_never_sees_the_test_part(tmp_path: Path, dataset: Dataset, comparison: Comparison) -> None:
    blind = dataclasses.replace(dataset, test=Forbidden(*dataclasses.astuple(dataset.test)))
    assert "test part was read" in (run_all(comparison, blind, tmp_path / "a")[0].error or "")  # the guard bites
    tuned, scores = tune(comparison, [1e-4, 0.1], blind, tmp_path / "b")
    assert [arm.lr for arm in tuned.arms] == [max(scores[arm.name], key=scores[arm.name].get) for arm in tuned.arms]
    assert tuned.arms[1].lr == 0.1 and set(scores["random"]) == {1e-4, 0.1}


def test_a_rate_that_fails_is_out(
    tmp_path: Path, dataset: Dataset, comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, scores = tune(dataclasses.replace(comparison, arms=ARMS[1:2]), [0.01, 1e25], dataset, tmp_path)
    assert tuned.arms[0].lr == 0.01 and set(scores["random"]) == {0.01}
    with pytest.raises(ValueError, match="fails at every one"):
        tune(dataclasses.replace(comparison, arms=ARMS[1:2]), [1e25], dataset, tmp_path)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path: Path, dataset: Dataset, comparison: Comparison) -> None:
    outcomes = run_all(comparison, dataset, tmp_path)
    path, told = write_report(comparison, dataset, outcomes, tmp_path, "selbp compare --arms '<b>'")
    table, *notes = told.split("\n\n")
    text = path.read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and len(page.links) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert "<script" not in text and not re.search(r'(src|href)="http', text) and "&lt;b&gt;" in text
    for part in ("gradient matching", "What the columns mean", "Machine", "torch", "same number of steps"):
        assert part in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"runs", "report.html", "table.md", "results.jsonl", "samples.png", "seconds.png", "time.png"}
    kept = (tmp_path / "table.md").read_text()
    assert [note.replace("\n", " ") for note in notes] == kept.rstrip().split("\n\n")[1:] and len(notes) == 3
    assert "\\" not in table and re.search(r"[^\\]\[[-+]\d", table) and table.count("\n") == 4
    assert [cells(line) for line in table.splitlines()[2:]] == [
        [ESCAPED.sub(r"\1", cell) for cell in cells(line)] for line in kept.splitlines()[2:5]
    ]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6
