"""A whole study, small: its budgets, its blindness, its cache, and the document that is made of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from selbp_study import pool as pool_module
from selbp_study import study as module
from selbp_study.costs import Cost
from selbp_study.data import HELD_OUT, Dataset, Split
from selbp_study.document import costs_table, document, read_result_file, reading_of, result_files, section, study_page
from selbp_study.findings import Findings, Row, direct_table
from selbp_study.pool import DatasetCache, Pool
from selbp_study.protocols import OWN_KEEP, PROTOCOLS, Cell, Protocol
from selbp_study.study import plan_cell, run_study
from selbp_study.study_command import dumps
from selbp_study.tuning import SEEDS

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = Protocol(
    "small",
    "a test",
    (Cell("digits", "mlp", 12, (0.25,), batch_size=32),),
    ("full", "random", "matching"),
    (0, 1),
    own_keeps=(4, 8),
)


def fixed_costs(wanted, _data, advance=lambda: None):
    """Milliseconds of a step: a forward and two for the backward, a selecting arm's forward being whole."""
    costs = {}
    for name, config in wanted.items():
        kept = config.kept() / config.batch_size
        value = 3 * kept if config.selector in ("full", "random") else 1 + 2 * kept
        costs[name] = Cost(value, value, value, {"backward": 2 * kept})
    return costs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(module, "measure", fixed_costs)
    return Pool(0, tmp_path / "study")


def by_place(result: dict) -> dict:
    return {(entry["arm"], entry["budget"]): entry for entry in result["entries"]}


def test_budgets_tuning_cache_and_document(runs: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run_study(PROTOCOL, runs)
    assert result["failed"] == {} and result["seconds"] == [12 * 1.5 / 1e3]
    found = by_place(result)
    assert len(found) == 10 == len(result["entries"])
    assert found["full", "steps"]["steps"] == 12 and found["full", "samples"]["steps"] == 3
    assert found["random", "samples"]["key"] == found["random", "steps"]["key"]
    # 18 ms: a full step takes 3, random .75, matching 1.5
    steps = {arm: found[arm, "time"]["steps"] for arm in ("full", "random", "matching")}
    assert steps == {"full": 6, "random": 24, "matching": 12}
    own = found[OWN_KEEP, "time"]
    assert own["keep"] in (4, 8) and own["steps"] == int(18 / (3 * own["keep"] / 32))
    for entry in result["entries"]:
        assert set(entry["accuracy"]) == {"0", "1"} and entry["curve"][-1][0] == entry["steps"] and not entry["errors"]
        assert len({rate for _, rate, _, _ in entry["tuning"]}) >= 2
    # The same again runs nothing; one seed more runs that seed alone.
    asked = []
    run_to_end = pool_module.run_to_end
    monkeypatch.setattr(
        pool_module, "run_to_end", lambda config, *rest: asked.append(config) or run_to_end(config, *rest)
    )
    assert run_study(PROTOCOL, Pool(0, runs.folder)) == result and asked == []
    more = run_study(dataclasses.replace(PROTOCOL, seeds=(0, 1, 2)), Pool(0, runs.folder))
    assert {config.seed for config in asked} == {2} and len(more["entries"]) == 10
    # The document needs the file alone.
    (tmp_path / "study-small.json").write_text(dumps(result))
    again = read_result_file(tmp_path / "study-small.json")
    assert again == json.loads(json.dumps(result)) and result_files(tmp_path) == [tmp_path / "study-small.json"]
    text = document([again])
    for part in ("digits, MLP, 8 of 32 samples", "random, own keep", "gradient matching", "3 steps (equal samples)"):
        assert part in text
    assert section(result) in text and "data:image/png;base64," in study_page(again)


def test_an_arm_with_a_share_of_the_budget_takes_as_many_steps_of_it(runs: Pool) -> None:
    half = "top-loss@share=0.5"
    found = by_place(run_study(dataclasses.replace(PROTOCOL, arms=("random", "top-loss", half), clock="random"), runs))
    for budget in ("steps", "samples", "time"):
        assert found[half, budget]["steps"] == found["top-loss", budget]["steps"] // 2
    tuned = dataclasses.replace(PROTOCOL, arms=("random", half), tuned_keeps=(half,), budgets=("time",), clock="random")
    own = by_place(run_study(tuned, runs))[half, "time"]
    assert own["steps"] == int(9 * 0.5 / (1 + 2 * own["keep"] / 32))  # 9 ms: 12 steps of random's .75


class Forbidden(Split):
    """A test part that may not be looked at."""

    def __getattribute__(self, name: str):
        if name in ("images", "labels", "batch", "take", "to", "__len__"):
            raise AssertionError(f"the test part was read: {name}")
        return super().__getattribute__(name)

    def __len__(self) -> int:
        raise AssertionError("the test part was read: len")


def test_gains_are_a_column_where_they_were_recorded(runs: Pool) -> None:
    result = run_study(PROTOCOL, runs)
    found = by_place(result)
    matching = found["matching", "steps"]
    assert matching["gain"] > matching["gain_at_cost"] > 0  # one training's median, of its 12 steps' last
    assert found["random", "steps"]["gain"] is None and found["full", "steps"]["gain"] is None
    assert f"| {matching['gain']:.3g} / {matching['gain_at_cost']:.3g} |" in section(result)
    assert "| arm | keep | ms a step | gain | rate |" in section(result)
    for entry in result["entries"]:  # as results were before they had any
        del entry["gain"], entry["gain_at_cost"]
    assert "| arm | keep | ms a step | rate |" in section(result)


def test_the_tuner_cannot_see_test_data(runs: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the search is on the held-out split, and goes through with the test part out of reach."""
    run_to_end = pool_module.run_to_end
    seen: list[tuple[str, int]] = []

    def blind(config, data: Dataset, folder):
        seen.append((config.dataset, config.seed))
        if config.seed not in SEEDS:
            return run_to_end(config, data, folder)
        whole = runs.sets("digits")
        guarded = dataclasses.replace(whole, test=Forbidden(*dataclasses.astuple(whole.test)))
        return run_to_end(config, guarded.held_out(), folder)

    monkeypatch.setattr(pool_module, "run_to_end", blind)
    protocol = dataclasses.replace(PROTOCOL, arms=("random",), budgets=("steps",))
    result = run_study(protocol, runs)
    assert result["failed"] == {} and all(entry["errors"] == {} for entry in result["entries"])
    assert all(name.endswith(HELD_OUT) == (seed in SEEDS) for name, seed in seen)
    assert {seed for _, seed in seen} == {*SEEDS, 0, 1}
    whole = runs.sets("digits")
    with pytest.raises(AssertionError, match="the test part was read"):  # the guard bites
        Forbidden(*dataclasses.astuple(whole.test)).batch(torch.arange(3))


def test_what_tunes_is_none_of_the_test_data(runs: Pool) -> None:
    plan = plan_cell(PROTOCOL.cells[0], PROTOCOL, DatasetCache(), module.Costs(runs.folder.parent / "none.json"))
    test = {image.numpy().tobytes() for image in DatasetCache()("digits").test.inputs}
    train = {image.numpy().tobytes() for image in DatasetCache()("digits").train.inputs}
    held = {image.numpy().tobytes() for image in plan.held_out.test.inputs}
    learned = {image.numpy().tobytes() for image in plan.held_out.train.inputs}
    assert held <= train and learned <= train and not held & learned and not (held | learned) & (test - train)


def test_a_failing_arm_is_a_line(runs: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    run_to_end = pool_module.run_to_end

    def fails(config, data, folder):
        if config.selector == "matching" and config.seed in (1, *(SEEDS if config.lr == 0.1 else ())):
            return pool_module.Finished(config, None, "out of luck")
        return run_to_end(config, data, folder)

    monkeypatch.setattr(pool_module, "run_to_end", fails)
    said: list[str] = []
    result = run_study(PROTOCOL, runs, say=said.append)
    entry = by_place(result)["matching", "steps"]
    assert entry["errors"] == {"1": "out of luck"} and set(entry["accuracy"]) == {"0"} and entry["lr"] != 0.1
    assert "(1 failed)" in section(result) and any("out of luck" in line for line in said)
    monkeypatch.setattr(
        pool_module,
        "run_to_end",
        lambda config, data, folder: (
            pool_module.Finished(config, None, "no")
            if config.selector == "matching"
            else run_to_end(config, data, folder)
        ),
    )
    result = run_study(PROTOCOL, Pool(0, runs.folder / "other"))
    assert "every rate fails" in next(iter(result["failed"].values())) and "every rate fails" in section(result)
    assert by_place(result)["random", "steps"]["accuracy"]


def test_differences_are_to_random_and_under_time_to_random_at_its_best(runs: Pool) -> None:
    result = run_study(PROTOCOL, runs)
    for entry in result["entries"]:
        value = {("random", "steps"): 70.0, ("random", "time"): 75.0, (OWN_KEEP, "time"): 80.0}.get(
            (entry["arm"], entry["budget"]), 81.0
        )
        entry["accuracy"] = {"0": value, "1": value + (0.5 if entry["arm"] == "matching" else 0.2)}
    findings = Findings(result)
    (place,) = findings.places
    rows = {(row.entry["arm"], budget): row for budget in findings.budgets for row in findings.rows[place, budget]}
    assert rows["matching", "steps"].difference.mean == pytest.approx(11.15)
    assert rows["matching", "time"].difference.mean == pytest.approx(1.15)
    assert rows["random", "time"].difference.mean == pytest.approx(-5.0)
    assert rows["random", "steps"].difference is None and rows[OWN_KEEP, "time"].difference is None
    assert rows["random", "time"].verdict == "behind"


def test_a_claim_has_each_arm_minus_the_full_batch_and_its_time_to_randoms_accuracy(runs: Pool) -> None:
    """Costs of 10 ms a step: random needs 20 steps. The arm pays 50 ms once and is there after 5 and 10 steps."""
    result = run_study(dataclasses.replace(PROTOCOL, arms=("full", "random", "matching"), curves=2), runs)
    for entry in result["entries"]:
        entry["curves"] = (
            {} if entry["arm"] != "matching" else {"0": [[0, 0.0], [10, 160.0]], "1": [[0, 0.0], [20, 160.0]]}
        )
        entry["accuracy"] = {"full": {"0": 70.0, "1": 71.0}, "matching": {"0": 82.0, "1": 84.0}}.get(
            entry["arm"], {"0": 80.0, "1": 80.0}
        )
        entry["steps"] = 20
        once = 50.0 if entry["arm"] == "matching" else 0.0
        entry["cost"] = f"{once} once"
        result["costs"][entry["cost"]] = {"median": 10.0, "low": 10.0, "high": 10.0, "phases": {"once": once}}
    findings = Findings(result)
    shown = direct_table(findings, findings.places[0])
    # 12 and 13 points; 100 and 150 ms of 200: the logarithms' mean, and half an interval of t(1) = 12.706.
    assert shown is not None and "+12.50 [+6.15, +18.85]" in shown
    middle = (math.log(0.5) + math.log(0.75)) / 2
    half = 12.7062 * (math.log(0.75) - math.log(0.5)) / 2
    wanted = f"{math.exp(middle):.2f} [{math.exp(middle - half):.2f}, {math.exp(middle + half):.2f}]"
    assert wanted in shown
    for entry in result["entries"]:
        entry["curves"] = {"0": [[0, 0.0], [10, 70.0]]}
    assert "not reached by 1 of 1 seeds" in str(direct_table(findings, findings.places[0]))
    for entry in result["entries"]:
        del entry["curves"]
    assert "| – |" in str(direct_table(findings, findings.places[0]))


def test_curves_are_kept_by_seed(runs: Pool) -> None:
    result = run_study(PROTOCOL, runs)
    for entry in result["entries"]:
        assert set(entry["curves"]) == set(entry["accuracy"])
        for seed, curve in entry["curves"].items():
            assert curve[-1] == [entry["steps"], entry["accuracy"][seed]] and curve[0][0] == 0


def test_a_training_that_collapsed_is_counted() -> None:
    assert (
        Row({"accuracy": {"0": 86.0, "1": 10.0, "2": 87.0}, "errors": {}}, None)
        .accuracy()
        .endswith("(1 of 3 collapsed)")
    )
    assert "collapsed" not in Row({"accuracy": {"0": 86.0, "1": 50.0, "2": 87.0}, "errors": {}}, None).accuracy()


def test_the_reading_that_is_not_charged_is_stated_where_it_was_measured() -> None:
    def result(**phases: float) -> dict:
        cost = {"median": 2.0, "low": 2.0, "high": 2.0, "phases": phases}
        return {"costs": {"digits mlp n=32 keep=0.25 random": cost, "digits mlp n=32 keep=0.25 matching": cost}}

    assert reading_of(result()) == [] and "Reading" not in costs_table(result())
    assert "at most 1.5% of its step" in costs_table(result(**{"read": 0.05, "read kept": 0.02}))


def test_a_claim_is_corrected_for_its_family(runs: Pool) -> None:
    result = run_study(dataclasses.replace(PROTOCOL, budgets=("steps",), seeds=(0, 1)), runs)
    for entry in result["entries"]:
        noise = {"random": (0.0, 0.0), "full": (0.1, 0.12), "matching": (1.0, 1.14)}[entry["arm"]]
        entry["accuracy"] = {str(seed): 80 + value for seed, value in enumerate(noise)}
    plain = {row.entry["arm"]: row for row in next(iter(Findings(result).rows.values()))}
    assert plain["matching"].difference.p < 0.05 and plain["matching"].verdict == "ahead"
    result["protocol"]["claim"] = True
    claimed = {row.entry["arm"]: row for row in next(iter(Findings(result).rows.values()))}
    assert claimed["matching"].p == pytest.approx(min(1, 2 * min(plain[a].difference.p for a in ("matching", "full"))))
    assert claimed["matching"].verdict == "no difference"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arms": ("full",)}, "random"),
        ({"seeds": (0, 1000)}, "1000"),
        ({"seeds": ()}, "seed"),
        ({"budgets": ("money",)}, "budget"),
        ({"arms": ("random", "random")}, "arm"),
    ],
)
def test_bad_protocols_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(PROTOCOL, **change)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_protocols_can_be_planned(name: str) -> None:
    protocol = PROTOCOLS[name]
    for cell in protocol.cells:
        for arm in map(module.Arm.parse, protocol.arms):
            assert arm.label
        assert cell.steps > 0
    if protocol.claim:
        assert len(protocol.seeds) >= 10 and not set(protocol.seeds) & {0, 1, 2, 3, 4}


def test_the_committed_document_is_what_the_committed_results_say() -> None:
    files = result_files(ROOT / "benchmarks" / "results")
    path = ROOT / "docs" / "measurements" / "study.md"
    assert path.exists() == bool(files)
    if files:
        assert path.read_text() == document([read_result_file(file) for file in files])
