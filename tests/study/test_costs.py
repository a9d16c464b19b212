"""Costs of steps and the arithmetic of a budget of time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from selbp_study.config import RunConfig
from selbp_study.costs import BLOCK, ROUNDS, Cost, Costs, cost_name, measure, steps_within
from selbp_study.data import Dataset
from selbp_study.run import PHASES, typical


def test_a_budget_of_time_is_steps_times_cost() -> None:
    cost = Cost(2.5, 2.4, 2.6, {})
    assert steps_within(1000.0, cost) == 400 and steps_within(999.9, cost) == 399 and steps_within(0.1, cost) == 1
    assert steps_within(800 * 0.1, Cost(0.1, 0.1, 0.1, {})) == 800  # rounding does not take the last step
    assert ROUNDS * (BLOCK - 1) >= 60


def test_measured_by_the_clock_that_is_handed_in(config: RunConfig, dataset: Dataset) -> None:
    ticks = iter(range(10**6))
    turns: list[int] = []
    configs = {"a": dataclasses.replace(config, selector="random"), "b": config}
    costs = measure(configs, dataset, rounds=2, clock=lambda: next(ticks) / 1000, advance=lambda: turns.append(1))
    assert len(turns) == 3  # the warm-up's and two
    for cost in costs.values():  # six readings a step, one between each two of its phases
        assert (cost.median, cost.low, cost.high) == pytest.approx((5.0, 5.0, 5.0))
        for phase in PHASES[:-1]:
            assert cost.phases[phase] == pytest.approx(1.0)
        assert (cost.phases["read"], cost.phases["read kept"]) == pytest.approx((1.0, 1.0))  # not in the step's 5


def test_a_schedule_of_two_kinds_of_steps_costs_their_weighted_medians() -> None:
    steps = torch.tensor([[9.0, 1], [1, 0], [11, 1], [99, 1], [2, 0], [10, 1], [1, 0], [3, 0]])
    steps = torch.cat([steps[:, :1].expand(-1, len(PHASES)), steps[:, 1:]], 1)
    # chosen 9 10 11 99, drawn 1 1 2 3; torch's median of an even number is the lower one
    assert typical(steps).tolist() == pytest.approx([0.5 * 10 + 0.5 * 1] * len(PHASES))
    assert typical(steps[[0, 2, 3]]).tolist() == pytest.approx([11.0] * len(PHASES))
    assert typical(steps[[0, 2, 3, 1]]).tolist() == pytest.approx([0.75 * 11 + 0.25 * 1] * len(PHASES))


def test_real_costs_rank_the_arms(config: RunConfig, dataset: Dataset) -> None:
    base = dataclasses.replace(config, model="cnn", batch_size=128)
    costs = measure(
        {
            "few": dataclasses.replace(base, selector="random", keep=4),
            "all": dataclasses.replace(base, selector="full", keep=1.0),
        },
        dataset,
        rounds=4,
    )
    assert 0 < costs["few"].median < costs["all"].median
    assert costs["few"].low <= costs["few"].median <= costs["few"].high


def test_a_name_holds_what_a_cost_depends_on(config: RunConfig) -> None:
    same = dataclasses.replace(
        config, seed=5, lr=0.3, steps=7, fingerprint="x", dataset="small+noise=0.2-held-out", evaluate_every=3
    )
    assert cost_name(same) == cost_name(config) == "small mlp n=32 keep=0.25 matching"
    for change in (
        {"keep": 0.5},
        {"cut": "1"},
        {"batch_size": 64},
        {"options": "a=1"},
        {"model": "cnn"},
        {"selector": "random"},
        {"head_gradient": "full"},
        {"backward": "rows"},
    ):
        assert cost_name(dataclasses.replace(config, **change)) != cost_name(config)


def test_costs_are_kept_and_later_ones_scaled(config: RunConfig, tmp_path: Path) -> None:
    a, b, c = (dataclasses.replace(config, keep=keep) for keep in (0.25, 0.5, 0.75))
    calls: list[list[str]] = []

    def clock(milliseconds: float):
        def measured(wanted):
            calls.append(list(wanted))
            return {name: Cost(milliseconds, milliseconds, milliseconds, {"score": milliseconds}) for name in wanted}

        return measured

    costs = Costs(tmp_path / "costs.json")
    costs.add([a, b], clock(2.0))
    costs.add([a, b], clock(99.0))
    assert len(calls) == 1 and costs[a].median == 2.0 and costs.machine
    again = Costs(tmp_path / "costs.json")
    again.add([a, c], clock(4.0))  # a slower day: a step takes twice as long as it did
    assert calls[1] == [cost_name(c), cost_name(a)]
    assert again[c] == Cost(2.0, 2.0, 2.0, {"score": 2.0}) and again[a].median == 2.0
    assert Costs(tmp_path / "costs.json")[c].median == 2.0
