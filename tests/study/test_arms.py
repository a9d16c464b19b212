"""Arms: a rule with training options of its own, written, named and carried into a configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from selbp_study.arms import ARMS, RULES, Arm
from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.models import CUTS, MODELS, place_of
from selbp_study.run import Run


def test_an_arm_is_read_from_text_and_names_itself_by_it(config: RunConfig) -> None:
    arm = Arm.parse("matching:ridge=0.01,rule=raw@keep=16,cut=2,lr=0.2,title=mine")
    assert (arm.keep, arm.cut, arm.lr, arm.label) == (16, "2", 0.2, "mine")
    assert arm.name == "matching:ridge=0.01,rule=raw@keep=16,cut=2"
    assert Arm.parse(arm.name) == dataclasses.replace(arm, lr=None, title=None)
    made = arm.config(config, 3)
    assert (made.selector, made.keep, made.cut, made.lr, made.seed) == ("matching:ridge=0.01,rule=raw", 16, "2", 0.2, 3)
    assert Arm.parse("random").config(config, 0).keep == config.keep and Arm("full").config(config, 0).keep == 1.0
    assert Arm("matching:ridge=0.1").label == "gradient matching (ridge=0.1)"
    assert Arm.parse("random@keep=13").label == "random (keep=13)"


def test_what_no_field_takes_goes_to_the_training_step(config: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    arm = Arm.parse("top-loss@label_smoothing=0.1")
    assert arm.options == "label_smoothing=0.1" and arm.name == "top-loss@label_smoothing=0.1"
    assert Run(arm.config(config, 0), dataset, tmp_path).wrapper is not None
    with pytest.raises(ValueError, match="colour"):
        Run(Arm.parse("top-loss@colour=red").config(config, 0), dataset, tmp_path)


BAD = (
    "best",
    "random@fast",
    "random@lr=slow",
    "random:fast",
    "random@batch_size=1.5",
    "random@share=0",
    "random@share=1.5",
    "random@share=half",
)


@pytest.mark.parametrize("text", BAD)
def test_bad_arms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="best|fast|slow|batch_size|share must be"):
        Arm.parse(text)


@pytest.mark.parametrize("text", ["rho", "rho@keep=16", "rho@sampling=scored", "rho@sampling=rho,proxy=false"])
def test_a_rule_that_lacks_what_it_reads_names_the_arm_that_has_it(text: str) -> None:
    with pytest.raises(ValueError, match="lacks what the rule reads.*take the arm rho-loss, or write rho@"):
        Arm.parse(text)
    for rule in RULES.values():
        if rule.sampling:
            assert f"sampling={rule.sampling}" in Arm.parse(rule.arm).options


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if not rule.sampling])
def test_every_rule_trains(name: str, config: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    run = Run(Arm.parse(name).config(dataclasses.replace(config, steps=2), 0), dataset, tmp_path)
    run.open()
    assert run.execute()["steps"] == 2


@pytest.mark.parametrize("name", ARMS)
def test_the_named_arms_run(name: str, config: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    arm = Arm.parse(name)
    assert arm.label == ARMS[name][0]
    run = Run(arm.config(dataclasses.replace(config, steps=4), 0), dataset, tmp_path)
    run.open()
    assert run.execute()["backward_samples"] == 4 * run.config.kept()


@pytest.mark.parametrize("model", MODELS)
def test_the_cuts_lie_one_below_the_other(model: str, dataset: Dataset) -> None:
    built = MODELS[model]((8,) if model == "transformer" else (8, 8), 10)
    order: list[str] = []  # as they end: a block after its layers
    for name, module in built.named_modules():
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    inputs = torch.zeros(3, 8, dtype=torch.int64) if model == "transformer" else dataset.train.batch(torch.arange(3))[0]
    built(inputs)
    places = [order.index(place) for place in CUTS[model]]
    assert places == sorted(places, reverse=True) and places[0] < order.index("head")
    if model in ("cnn", "wide-cnn", "mlp"):  # the others cut between blocks
        layers = [name for name in order if built.get_submodule(name)._parameters]
        for depth, place in enumerate(places, 1):
            assert sum(order.index(name) > place for name in layers) == depth
    assert [place_of(model, str(depth)) for depth in (1, 2)] == list(CUTS[model])
    with pytest.raises(ValueError, match="layers below the output"):
        place_of(model, "9")
    assert place_of(model, "body.1") == "body.1"


def test_states_are_saved_every_so_many_steps(config: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    left = [25]

    def stop(_samples: int, _loss: float) -> None:
        left[0] -= 1
        if not left[0]:
            raise Stop

    config = dataclasses.replace(config, journal_every=10)
    whole = Run(config, dataset, tmp_path / "whole")
    whole.open()
    expected = whole.execute()
    run = Run(config, dataset, tmp_path / "parts")
    run.open()
    with pytest.raises(Stop):
        run.execute(stop)
    run = Run(config, dataset, tmp_path / "parts")
    assert run.open() == 20  # the five steps since then run again
    result = run.execute()
    assert [(p["step"], p["accuracy"]) for p in result["curve"]] == [
        (p["step"], p["accuracy"]) for p in expected["curve"]
    ]
