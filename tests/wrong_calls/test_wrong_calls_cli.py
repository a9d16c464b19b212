"""Wrong command lines and configurations: one line that names the option, what it takes and what it got."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from selbp_study.arms import Arm
from selbp_study.cli import main
from selbp_study.compare import Comparison
from selbp_study.config import RunConfig
from selbp_study.data import DataError, Dataset, load, resolve
from selbp_study.run import Run
from selbp_study.tuning import nearest

WHOLE, SHARE, POSITIVE = "must be a whole number from", "must be a share in (0, 1]", "must be a number above 0"
# The line, and parts of what is said: the option, what it takes, what it got.
LINES: dict[str, tuple[str, ...]] = {
    "": ("COMMAND",),
    "fly": ("COMMAND", "choose from", "'fly'"),
    "trian": ("COMMAND", "choose from", "'trian'"),
    **{f"{command} --nonsense 3": ("--nonsense",) for command in ("train", "compare", "study", "info")},
    **{f"{command} {option}": (option, "expected one argument") for command, option in (
        ("train", "--keep"), ("train", "--selector"), ("train", "--out"), ("compare", "--arms"), ("compare", "--tune"),
        ("study", "--protocol"), ("study", "--render"), ("info", "--out"))},
    **{f"train {option}={text}": (option, WHOLE, repr(text)) for option in (
        "--steps", "--batch-size", "--evaluate-every") for text in ("0", "-1", "1.5", "many", "1e9", "10000000000")},
    **{f"train --threads={text}": ("--threads", WHOLE, repr(text)) for text in ("-1", "two", "1.0", "100000")},
    **{f"train --seed={text}": ("--seed", WHOLE, repr(text)) for text in ("-1", "x", "4294967296", "0.5")},
    **{f"train --lr={text}": ("--lr", POSITIVE, repr(text)) for text in ("0", "-0.1", "nan", "inf", "fast", "0,1")},
    **{f"compare --lr={text}": ("--lr", POSITIVE, repr(text)) for text in ("0", "nan", "1e400")},
    **{f"train --epochs={text}": ("--epochs", POSITIVE, repr(text)) for text in ("0", "-1", "nan", "inf", "two")},
    **{f"train --keep={text}": ("--keep", SHARE, repr(text)) for text in ("0", "0.0", "-1", "1.5", "nan", "half")},
    **{f"compare --keep={text}": ("--keep", SHARE, repr(text)) for text in ("-0.25", "inf")},
    **{f"train {option}=nonsense": (option, "choose from", "'nonsense'") for option in (
        "--dataset", "--model", "--backward", "--scoring", "--head-gradient")},
    **{f"compare {option}=nonsense": (option, "choose from", "'nonsense'") for option in ("--preset", "--budget")},
    "study --protocol=nonsense": ("--protocol", "choose from", "'nonsense'"),
    "train --epochs=1 --steps=5": ("--steps", "not allowed with argument --epochs"),
    "compare --lr=.1 --tune=.1": ("--tune", "not allowed with argument --lr"),
    **{f"compare --seeds={text}": ("--seeds", "must be seeds", repr(text)) for text in (
        "a", "4-2", "1,", "1,1", "0-2,1", "-1", "4294967296", "0-99999999999", "1.5", "0-4-8")},
    "study --seeds=x": ("--seed", "must be seeds", "'x'"),
    **{f"compare --tune={text}": ("--tune", "must be rates", repr(text)) for text in (
        "x", "0.1,", "0.1,0.1", "0.1,-1", "nan", "0", "inf")},
    "compare --arms=,": ("--arms", "must be names", "','"),
    "study --arms=,": ("--arms", "must be names", "','"),
    **{f"study --workers={text}": ("--workers", WHOLE, repr(text)) for text in ("-1", "x", "2.5", "99999")},
    **{f"study --steps={text}": ("--steps", WHOLE, repr(text)) for text in ("0", "x")},
    **{f"study --name={text}": ("--name", "must be letters", repr(text)) for text in ("../up", "a/b", ".dot", "a,b")},
    **{f"train --dataset=digits {rest}": parts for rest, parts in {
        "--batch-size=100000": ("--batch-size", "must lie in 1..1438", "got 100000"),
        "--device=abacus": ("--device abacus",), "--device=cuda:x": ("--device cuda:x",),
        "--selector=best": ("--selector", "there are", "'best'"),
        "--selector=random:colour=red": ("--selector random:colour=red", "colour"),
        "--selector=random:colour": ("--selector random:colour", "name:option=value", "'colour'"),
        "--selector=loss-percentile:beta=-1": ("--selector", "beta must be", "-1"),
        "--selector=top-loss:weights=heavy": ("--selector", "weights must be one of", "'heavy'"),
        "--selector=matching:ridge=nan": ("--selector", "ridge must be", "nan"),
        "--selector=": ("--selector", "there are", "''"),
        "--data=/nowhere": ("digits", "no folder", "/nowhere"),
        "--model=transformer": ("transformer",)}.items()},
    "train --data=/nowhere": ("/nowhere: no such folder", "--data"),
    "train --dataset=bible-kjv --data=/nowhere": ("/nowhere/bible.data", "--data"),
    **{f"compare --dataset=digits --steps=3 --arms={arms}": parts for arms, parts in {
        "random,best": ("--arms best", "there are", "'best'"),
        "random,random": ("arm random is given twice",),
        "random@lr=fast": ("--arms random@lr=fast", "lr must be a number", "'fast'"),
        "random@lr=-1": ("--arms random@lr=-1", "lr must be a number", "-1"),
        "random@batch_size=0": ("--arms random@batch_size=0", "batch_size must be", "0"),
        "random@batch_size=5000": ("--arms random@batch_size=5000", "at most the 1438", "5000"),
        "random@keep=2.0": ("--arms random@keep=2.0", "keep must be", "2.0"),
        "random@keep=all": ("--arms random@keep=all", "keep must be", "'all'"),
        "random@scoring=odd": ("--arms random@scoring=odd", "scoring must be one of", "'odd'"),
        "random@precision=float16": ("--arms random@precision=float16", "precision must be one of", "'float16'"),
        "random@backward=forward": ("--arms random@backward=forward", "backward must be one of", "'forward'"),
        "matching@cut=nowhere": ("--arms matching@cut=nowhere", "nowhere"),
        "matching@cut=99": ("--arms matching@cut=99", "99"),
        "random@colour=red": ("--arms random@colour=red", "colour"),
        "random@every=0": ("--arms random@every=0", "every"),
        "random@loss": ("--arms random@loss", "name:option=value", "'loss'")}.items()},
    "compare --dataset=digits --model=transformer": ("transformer",),
    "study --protocol=quick --arms=random,best": ("--arms best", "there are", "'best'"),
    "study --protocol=quick --arms=matching": ("random", "among its arms"),
    "study --protocol=quick --arms=random,random": ("at least one arm and none twice",),
    "study --protocol=quick --seeds=1000": ("1000", "others"),
    "study --protocol=quick --data=/nowhere": ("/nowhere",),
    "study --render=/nowhere": ("/nowhere", "no such file"),
    "study --render=/nowhere/at/all.json": ("/nowhere/at/all.json", "no such file"),
    "bench --seed=x": ("--seed", WHOLE, "'x'"),
    "info --json=yes": ("--json", "'yes'"),
}  # fmt: skip


def test_there_are_as_many_as_there_should_be() -> None:
    assert len(LINES) >= 140


@pytest.mark.parametrize("line", LINES, ids=[line or "nothing" for line in LINES])
def test_a_wrong_command_line_is_one_line(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(line.split(" ") if line else [])
    except SystemExit as caught:
        status = caught.code
    said = capsys.readouterr().err
    assert status in (1, 2) and said.startswith("selbp") and said.count("\n") == 1 and "Traceback" not in said, said
    assert [part for part in LINES[line] if part not in said] == [], said
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture
def config(digits: Dataset) -> RunConfig:
    return RunConfig(
        dataset=digits.name, fingerprint=digits.fingerprint, selector="random", steps=5, lr=0.1, model="mlp"
    )


CHOICES = "model backward scoring head_gradient precision"
WRONG_VALUES: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("steps batch_size evaluate_every journal_every", (0, -3, 2.0, True, None, "5", float("nan"), [5])),
    ("lr weight_decay momentum warmup", (-0.1, float("nan"), float("inf"), True, None, "0.1", [0.1])),
    ("momentum warmup", (1.0, 1)),
    ("keep", (0, 0.0, -1, 1.5, True, None, "0.25", float("nan"), [1])),
    ("seed", (-1, 1 << 32, 0.5, True, None, "0")),
    ("threads", (-1, 1.0, None)),
    (f"{CHOICES} dataset selector cut options device fingerprint", (5, None, ["x"])),
    (CHOICES, ("odd",)),
)
VALUES = {
    f"{name}={value!r}": (name, value) for names, values in WRONG_VALUES for name in names.split() for value in values
}


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_field_of_a_configuration(case: str, config: RunConfig) -> None:
    name, value = VALUES[case]
    with pytest.raises(ValueError, match=f"^{name} must ") as caught:
        dataclasses.replace(config, **{name: value})
    assert f"got {value!r}" in str(caught.value)


def test_numbers_of_numpy_are_numbers(config: RunConfig, digits: Dataset, tmp_path: Path) -> None:
    ours = dataclasses.replace(
        config,
        steps=np.int64(5),
        lr=np.float64(0.1),
        keep=np.float64(0.25),
        seed=np.int32(0),
        threads=np.int16(0),
        batch_size=np.uint8(128),
        momentum=np.float64(0.9),
    )
    assert ours == config and ours.key() == config.key() and type(ours.steps) is int and type(ours.lr) is float
    assert dataclasses.replace(config, lr=np.float32(0.5)).lr == 0.5
    assert dataclasses.replace(config, keep=np.int64(3)).kept() == 3
    with pytest.raises(ValueError, match="keep must be"):
        dataclasses.replace(config, keep=np.float32(1.5))
    comparison = Comparison(
        config, [Arm("random", lr=np.float32(0.5)), Arm("matching", keep=np.int64(4))], [np.int64(1)]
    )
    assert [(run.lr, run.kept(), run.seed) for _, run in comparison.runs()] == [(0.5, 32, 1), (0.05, 4, 1)]
    run = Run(ours, digits, tmp_path)
    run.open()
    assert run.execute()["steps"] == 5
    assert digits.held_out(np.float64(0.1)).name == digits.held_out(0.1).name
    assert digits.with_label_noise(np.float64(0.25)).name == "digits+noise=0.25"
    assert nearest(np.float64(0.05)) == nearest(0.05)


@pytest.mark.parametrize("share", [0, 1, 1.0, -0.5, float("nan"), "0.1", None, [0.1]], ids=repr)
def test_wrong_shares_of_the_data(share: object, digits: Dataset) -> None:
    with pytest.raises(ValueError, match="share must be a number in"):
        digits.with_label_noise(share)
    with pytest.raises(ValueError, match="fraction must be a number in"):
        digits.held_out(share)


@pytest.mark.parametrize(
    "name", ["nowhere", "", "digits+noise=", "digits+noise=x", "digits+noise=2", "digits+noise=nan"]
)
def test_wrong_names_of_data(name: str) -> None:
    with pytest.raises(DataError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value) and (name or "''") in str(caught.value)
