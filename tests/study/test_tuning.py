"""The search for a rate: it finds the top of a hill, is fair to every arm, and cannot see test data."""

from __future__ import annotations

import math

import pytest

from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.tuning import RATES, SEEDS, nearest, search_rates, tuning_config


def search(accuracy, keeps=(0.25,), start=0.05):
    """Run a search against a function of (keep, rate, seed); returns its choice and what it asked."""
    trials, asked = (found := search_rates(keeps, start)).send(None), []
    while True:
        asked += trials
        try:
            trials = found.send([accuracy(*trial) for trial in trials])
        except StopIteration as stop:
            return stop.value, asked


@pytest.mark.parametrize("best", RATES)
@pytest.mark.parametrize("start", [0.001, 0.05, 1.0])
def test_the_top_of_a_hill_is_found_from_anywhere(best: float, start: float) -> None:
    choice, asked = search(lambda _keep, rate, _seed: -abs(math.log(rate / best)), start=start)
    assert choice.lr == best and len(asked) == len(set(asked)) and {seed for _, _, seed in asked} == set(SEEDS)
    assert len(choice.tried) == len({rate for _, rate, _ in asked})


def test_the_grid_goes_from_below_005_to_above_2_by_factors_of_2() -> None:
    assert RATES[0] < 0.005 and RATES[-1] > 0.2
    assert all(b / a == pytest.approx(2) for a, b in zip(RATES, RATES[1:], strict=False))
    assert nearest(0.05) == RATES.index(0.05) and nearest(9.0) == len(RATES) - 1


def test_one_seeds_luck_does_not_decide() -> None:
    def accuracy(_keep, rate, seed):
        return {0.05: 80.0, 0.1: 81.0 if seed == SEEDS[0] else 70.0}.get(rate, 10.0)

    choice, _ = search(accuracy)
    assert choice.lr == 0.05


def test_keeps_compete() -> None:
    choice, asked = search(lambda keep, rate, _seed: keep - abs(math.log(rate / 0.1)), keeps=(13, 64, 32))
    assert (choice.keep, choice.lr) == (64, 0.1) and {keep for keep, _, _ in asked} == {13, 32, 64}


def test_rates_that_fail_lose_and_where_all_fail_it_says_so() -> None:
    choice, _ = search(lambda _keep, rate, _seed: -math.inf if rate > 0.02 else rate)
    assert choice.lr == max(rate for rate in RATES if rate <= 0.02)
    with pytest.raises(ValueError, match="every rate fails"):
        search(lambda *_: -math.inf)


def test_only_held_out_training_data_tunes(config: RunConfig, dataset: Dataset) -> None:
    held_out = dataset.held_out()
    tuning = tuning_config(config, held_out, 0.5, 0.2, 1000)
    assert (tuning.dataset, tuning.fingerprint) == ("small-held-out", held_out.fingerprint)
    assert (tuning.keep, tuning.lr, tuning.seed, tuning.evaluate_every) == (0.5, 0.2, 1000, config.steps)
    with pytest.raises(ValueError, match="held-out"):
        tuning_config(config, dataset, 0.5, 0.2, 1000)
