"""Chance and memory: generators, seeds, and state that goes on where it stopped."""

import dataclasses

import pytest
import torch
from support.selection_cases import Batch

import selbp


def steps(rule, count, first=0, generator=None):
    return [Batch(n=24, seed=s).select(rule, 6, generator=generator) for s in range(first, first + count)]


def same(one, two):
    return all(
        torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights) for a, b in zip(one, two, strict=True)
    )


def test_the_generator_drives_every_draw(rule):
    runs = []
    for seed in (11, 11, 12):
        torch.manual_seed(len(runs))  # must not matter
        before = torch.get_rng_state()
        runs.append(steps(dataclasses.replace(rule), 4, generator=torch.Generator().manual_seed(seed)))
        assert torch.equal(before, torch.get_rng_state())
    assert same(runs[0], runs[1])
    draws = not isinstance(
        rule, (selbp.Full, selbp.TopLoss, selbp.TopGradNorm, selbp.GradientMatching, selbp.ReducibleLoss)
    )
    assert same(runs[0], runs[2]) != draws


def test_the_global_seed_drives_every_draw(rule):
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        runs.append(steps(dataclasses.replace(rule), 3))
    assert same(*runs)


def test_a_resumed_run_goes_on_bit_for_bit(rule, tmp_path):
    generator = torch.Generator().manual_seed(1)
    steps(rule, 5, generator=generator)
    torch.save({"rule": rule.state_dict(), "chance": generator.get_state()}, tmp_path / "state.pt")
    rest = steps(rule, 5, first=5, generator=generator)

    resumed = dataclasses.replace(rule)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["rule"])
    generator = torch.Generator()
    generator.set_state(state["chance"])
    assert same(rest, steps(resumed, 5, first=5, generator=generator))
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, rule.state_dict()[name], rtol=0, atol=0, equal_nan=True)


def test_a_state_is_a_copy(rule):
    steps(rule, 2)
    state = rule.state_dict()
    frozen = {name: value.clone() for name, value in state.items()}
    steps(rule, 2, first=2)
    other = dataclasses.replace(rule)
    other.load_state_dict(state)
    held = other.state_dict()
    steps(other, 2, first=4)
    other.load_state_dict(held)
    for value in held.values():
        value.zero_()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0, equal_nan=True)
    for name, value in state.items():
        torch.testing.assert_close(value, frozen[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {"nothing": 1},
        {"losses": 1, "tau": 2},
        {"losses": [1.0]},
        {"tau": 1.0},
        {"losses": torch.zeros(3, dtype=torch.float64)},
        {"losses": torch.zeros(1024)},
        {"tau": torch.zeros(1)},
        {"tau": torch.zeros((), dtype=torch.float32)},
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(rule, bad):
    steps(rule, 2)
    before = rule.state_dict()
    with pytest.raises(ValueError, match="must"):
        rule.load_state_dict(bad)
    for name, value in rule.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_generator_elsewhere_is_refused(rule):
    """On the wrong device torch would fail in the middle of a draw."""

    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ValueError, match="generator must be on"):
        Batch(n=8).select(rule, 2, generator=Elsewhere())
