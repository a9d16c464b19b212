"""Run configurations: checks at construction, the decayed rate, keys; and the models they name."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import selbp
from selbp_study.arms import RULES, build_selector, keep_for, parse
from selbp_study.config import RunConfig
from selbp_study.data import Split, Text
from selbp_study.models import CUTS, MODELS, SmallCNN, build_model, model_for, place_of

BASE = RunConfig(dataset="digits", fingerprint="0", selector="random", steps=100, lr=0.1)


WRONG: dict[str, tuple[object, ...]] = {
    "steps": (0, 1.5, True),
    "batch_size": (0,),
    "lr": (0.0, float("nan"), -1.0),
    "momentum": (1.0,),
    "warmup": (1.0,),
    "seed": (-1, 1 << 32),
    "model": ("vit",),
    "backward": ("magic",),
    "scoring": ("train",),
    "head_gradient": ("none",),
    "keep": (0.0, 1.5, -1, True, float("nan")),
    "threads": (-1,),
    "evaluate_every": (0,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_bad_values_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(BASE, **{field: value})


@pytest.mark.parametrize(("keep", "kept"), [(0.25, 32), (1.0, 128), (1, 1), (500, 128), (0.001, 1)])
def test_keep_means_a_share_or_a_number(keep: float, kept: int) -> None:
    assert dataclasses.replace(BASE, keep=keep).kept() == kept


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_every_run_decays_its_own_rate(steps: int, warmup: float) -> None:
    config = dataclasses.replace(BASE, steps=steps, warmup=warmup)
    rates = [config.rate(step) for step in range(steps)]
    assert all(0 < rate <= config.lr for rate in rates) and config.rate(steps) == 0
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    if steps == 100:
        assert max(rates) == config.lr and rates[-1] < 0.12 * config.lr


def test_json_round_trip_and_keys() -> None:
    again = RunConfig.from_dict(json.loads(json.dumps(BASE.as_dict())))
    assert again == BASE and again.key() == BASE.key() and not again.differences(BASE)
    other = dataclasses.replace(BASE, lr=0.2)
    assert other.key() != BASE.key() and other.differences(BASE) == ["lr: 0.2, not 0.1"]
    with pytest.raises(ValueError, match="fields"):
        RunConfig.from_dict({"lr": 0.1})


def test_selector_specifications() -> None:
    assert parse("matching:ridge=0.01,nonnegative=false,rule=raw")[1] == {
        "ridge": 0.01,
        "nonnegative": False,
        "rule": "raw",
    }
    assert keep_for("full", 0.25) == 1.0 and keep_for("random", 0.25) == 0.25
    with pytest.raises(ValueError, match="there are full, random"):
        build_selector("best")
    with pytest.raises(ValueError, match="name:option=value"):
        build_selector("random:fast")
    with pytest.raises(ValueError, match="colour"):
        build_selector("random:colour=red")


def split(rows: int, columns: int) -> Split:
    return Split(torch.randint(0, 256, (20, rows, columns)).byte(), torch.arange(20) % 10, 100.0, 50.0)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"transformer"}))
@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (9, 17)])
def test_models_fit_the_data(name: str, shape: tuple[int, int]) -> None:
    data = split(*shape)
    model = build_model(name, data, 10, seed=0)
    assert model(data.batch(torch.arange(7))[0]).shape == (7, 10)
    assert isinstance(model.head, torch.nn.Linear)


def test_the_cnn_has_the_size_it_says_and_stays_channels_last() -> None:
    data = split(28, 28)
    model = build_model("cnn", data, 10, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == 98_442
    layouts = []
    for layer in model.body:
        if isinstance(layer, torch.nn.MaxPool2d):
            layer.register_forward_hook(
                lambda _module, inputs, output: layouts.extend(
                    x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
                    for x in (*inputs, output)
                )
            )
    model(data.batch(torch.arange(7))[0])
    assert len(layouts) == 6 and all(layouts)
    with pytest.raises(ValueError, match="8 x 8"):
        SmallCNN((7, 28), 10)


def text(n: int = 20, length: int = 12, n_classes: int = 7) -> Text:
    codes = torch.randint(0, n_classes, (n, length + 1), generator=torch.Generator().manual_seed(0))
    return Text(codes[:, :-1].to(torch.uint8), codes[:, 1:].contiguous())


def test_the_transformer_reads_what_is_before_and_nothing_after() -> None:
    data = text()
    assert model_for(data) == "transformer" and model_for(split(8, 8)) == "cnn"
    model = build_model("transformer", data, 7, seed=0)
    codes, _ = data.batch(torch.arange(5))
    before = model(codes)
    assert before.shape == (5, 12, 7)
    codes[:, 6] = (codes[:, 6] + 1) % 7
    moved = (model(codes) - before).abs().amax((0, 2))
    assert (moved[:6] == 0).all() and (moved[6:] > 0).all()


def test_a_model_for_other_data_is_refused() -> None:
    for name in set(MODELS) - {"transformer"}:
        with pytest.raises(ValueError, match="use transformer"):
            build_model(name, text(), 7, seed=0)
    with pytest.raises(ValueError, match="reads text"):
        build_model("transformer", split(8, 8), 10, seed=0)


@pytest.mark.parametrize(("name", "size"), [("wide-cnn", 434_718), ("resnet", 77_642)])
def test_the_others_have_the_size_they_say(name: str, size: int) -> None:
    assert sum(x.numel() for x in build_model(name, split(28, 28), 10, seed=0).parameters()) == size


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_leaves_the_layers_above_it_that_it_says(name: str) -> None:
    data = text() if name == "transformer" else split(8, 8)
    model = build_model(name, data, 7, seed=0)
    modules = dict(model.named_modules())
    hidden = [modules[place_of(name, str(cut))] for cut in range(1, 1 + len(CUTS[name]))]
    order: list[torch.nn.Module] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, _inputs, _output: order.append(module))
    model(data.batch(torch.arange(3))[0])
    places = [order.index(module) for module in hidden]
    assert places == sorted(places, reverse=True)  # deeper with every number
    with pytest.raises(ValueError, match="layers below the output"):
        place_of(name, str(1 + len(CUTS[name])))


@pytest.mark.parametrize("name", ["resnet", "transformer"])
def test_samples_do_not_mix_and_the_backward_runs_on_rows(name: str) -> None:
    data = text() if name == "transformer" else split(12, 12)
    model = build_model(name, data, 10, seed=0)
    inputs, target = data.batch(torch.arange(20))
    torch.testing.assert_close(model(inputs)[:3], model(inputs[:3]), atol=1e-5, rtol=1e-4)
    found = selbp.diagnose(model, (inputs, target), 0.25)
    assert found.row_flops > 0 == found.dense_flops


def test_initial_weights_depend_on_the_seed_alone() -> None:
    data = split(8, 8)
    before = torch.get_rng_state()
    first = build_model("cnn", data, 10, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second, third = build_model("cnn", data, 10, seed=3).state_dict(), build_model("cnn", data, 10, seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], third["head.weight"])


def test_every_rule_has_a_label_and_a_rate() -> None:
    assert all(rule.label and rule.summary and rule.lr > 0 for rule in RULES.values())
