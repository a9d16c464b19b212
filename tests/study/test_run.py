"""A run: deterministic, resumable to the bit from any step, blind to the test part."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processes
from support.images import write_set

from selbp_study import journal
from selbp_study.cli import main
from selbp_study.config import RunConfig
from selbp_study.data import Dataset, Split
from selbp_study.run import PHASES, BatchOrder, Diverged, Run, evaluate, read_config, read_result
from selbp_study.storage import JsonLines

RULES = ("full", "random", "top-loss", "loss-percentile", "gradnorm", "matching")


class Stop(Exception):
    """A kill, as seen from inside the process."""


def stop_after(steps: int):
    left = steps

    def advance(_samples: int, _loss: float) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Stop

    return advance


def finish(config: RunConfig, data: Dataset, folder: Path) -> dict:
    run = Run(config, data, folder)
    run.open()
    return run.execute()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def same_weights(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def log_without_times(folder: Path) -> list[dict]:
    rows = JsonLines(folder / "log.jsonl").read()
    return [{name: value for name, value in row.items() if name not in ("seconds", "milliseconds")} for row in rows]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_a_run_stopped_at_any_step_ends_bit_for_bit_the_same(
    tmp_path: Path, dataset: Dataset, config: RunConfig, rule: str, model: str
) -> None:
    config = dataclasses.replace(config, selector=rule, model=model, keep=1.0 if rule == "full" else 0.25)
    whole = finish(config, dataset, tmp_path / "whole")
    for stop in (1, 13):  # 13 more: inside an epoch, a window and between two evaluations
        run = Run(config, dataset, tmp_path / "parts")
        run.open()
        with pytest.raises(Stop):
            run.execute(stop_after(stop))
    run = Run(config, dataset, tmp_path / "parts")
    assert run.open() == 14
    parts = run.execute()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "parts")
    assert parts["accuracy"] == whole["accuracy"] and parts["backward_samples"] == whole["backward_samples"]
    assert whole["backward_samples"] == 30 * (32 if rule == "full" else 8)


@pytest.mark.parametrize("rule", ["full", "random", "top-loss", "gradnorm", "matching", "divbs"])
def test_a_run_on_text_learns_and_resumes_bit_for_bit(
    tmp_path: Path, text: Dataset, config: RunConfig, rule: str
) -> None:
    config = dataclasses.replace(
        config,
        dataset=text.name,
        fingerprint=text.fingerprint,
        model="transformer",
        selector=rule,
        keep=1.0 if rule == "full" else 0.25,
    )
    whole = finish(config, text, tmp_path / "whole")
    run = Run(config, text, tmp_path / "parts")
    run.open()
    with pytest.raises(Stop):
        run.execute(stop_after(13))
    run = Run(config, text, tmp_path / "parts")
    assert run.open() == 13
    run.execute()
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "parts")
    assert whole["accuracy"] > 60  # chance is 14, and what is to be had 83
    assert whole["backward_samples"] == 30 * (32 if rule == "full" else 8)


@pytest.mark.parametrize("cut", ["1", "2"])
def test_a_cut_in_the_transformer(tmp_path: Path, text: Dataset, config: RunConfig, cut: str) -> None:
    config = dataclasses.replace(config, dataset=text.name, fingerprint=text.fingerprint, model="transformer", cut=cut)
    assert finish(config, text, tmp_path)["accuracy"] > 60


def test_a_texts_accuracy_counts_characters(text: Dataset) -> None:
    class Guess(torch.nn.Module):
        def forward(self, codes: torch.Tensor) -> torch.Tensor:
            return 3.0 * torch.nn.functional.one_hot((codes + 1) % 7, 7).float()

    inputs, target = text.test.batch(torch.arange(len(text.test)))
    accuracy, loss = evaluate(Guess(), text.test, torch.device("cpu"), rows=7)
    assert accuracy == pytest.approx(100 * float((target == (inputs + 1) % 7).float().mean()), abs=1e-4)
    exact = torch.nn.functional.cross_entropy(Guess()(inputs).flatten(0, 1), target.flatten())
    assert loss == pytest.approx(float(exact), rel=1e-5)


def test_a_state_of_another_step_would_be_noticed(tmp_path: Path, dataset: Dataset, config: RunConfig) -> None:
    """The comparison above can fail: resuming one step off gives other weights."""
    finish(config, dataset, tmp_path / "whole")
    run = Run(config, dataset, tmp_path / "parts")
    run.open()
    with pytest.raises(Stop):
        run.execute(stop_after(10))
    run = Run(config, dataset, tmp_path / "parts")
    run.open()
    run.step += 1
    run.execute()
    assert not same_weights(tmp_path / "whole", tmp_path / "parts")


def test_what_a_finished_run_leaves(tmp_path: Path, dataset: Dataset, config: RunConfig) -> None:
    result = finish(config, dataset, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "log.jsonl", "model.pt", "result.json"]
    assert read_config(tmp_path) == config and read_result(tmp_path) == json.loads(json.dumps(result))
    assert [point["step"] for point in result["curve"]] == [0, 10, 20, 30]
    assert result["seconds"]["total"] >= result["seconds"]["score"] + result["seconds"]["backward"] > 0
    assert result["accuracy"] > 30  # it learns: chance is 10


def test_arms_of_a_seed_start_alike(tmp_path: Path, dataset: Dataset, config: RunConfig) -> None:
    runs = [
        Run(dataclasses.replace(config, selector=rule), dataset, tmp_path / rule) for rule in ("random", "matching")
    ]
    for mine, theirs in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(runs[0].order.indices(5), runs[1].order.indices(5))


def test_epochs_see_every_sample_once() -> None:
    order = BatchOrder(100, 10, seed=3)
    epochs = [torch.cat([order.indices(step) for step in range(start, start + 10)]) for start in (0, 10)]
    assert all(torch.equal(epoch.sort().values, torch.arange(100)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(BatchOrder(100, 10, seed=3).indices(17), order.indices(17))
    with pytest.raises(ValueError, match="100 training samples"):
        BatchOrder(100, 101, seed=0)


def other_test_part(data: Dataset) -> Dataset:
    test = Split(255 - data.test.inputs, (data.test.labels + 3) % 10, data.test.mean, data.test.std)
    return dataclasses.replace(data, test=test)


@pytest.mark.parametrize("rule", RULES)
def test_training_does_not_depend_on_the_test_part(
    tmp_path: Path, dataset: Dataset, config: RunConfig, rule: str
) -> None:
    config = dataclasses.replace(config, selector=rule)
    first = finish(config, dataset, tmp_path / "a")
    second = finish(config, other_test_part(dataset), tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b") and first["accuracy"] != second["accuracy"]


def test_evaluation_leaves_the_model_as_it_was(dataset: Dataset) -> None:
    class Chatty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(64, 10))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training and not torch.is_grad_enabled()
            return self.layers(x)

    model = Chatty().train()
    before = torch.get_rng_state()
    accuracy, loss = evaluate(model, dataset.test, torch.device("cpu"), rows=7)
    assert model.training and torch.equal(torch.get_rng_state(), before)
    inputs, target = dataset.test.batch(torch.arange(100))
    logits = model.layers.eval()(inputs).detach()
    assert accuracy == pytest.approx(100 * float((logits.argmax(1) == target).float().mean()), abs=1e-4)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-5)


def test_a_diverging_run_says_so(tmp_path: Path, dataset: Dataset, config: RunConfig) -> None:
    with pytest.raises(Diverged, match="lower --lr"):
        finish(dataclasses.replace(config, selector="random", lr=1e25), dataset, tmp_path)


def _killed(left: int, command: list[str]) -> None:
    """The command, killed before its write number ``left``; a line of the log is half written then."""
    journal.time = types.SimpleNamespace(
        monotonic=lambda: 0.0
    )  # no durable copies by the clock: all writes are counted
    writes = itertools.count(1)
    write, append = os.pwrite, JsonLines.append

    def last() -> bool:
        return next(writes) == left

    def counted_write(*arguments: Any) -> int:
        if last():
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*arguments)

    def counted_append(log: JsonLines, row: dict[str, Any]) -> None:
        if last():
            with log.path.open("ab") as file:
                file.write(b'{"kind": "tra')
            os.kill(os.getpid(), signal.SIGKILL)
        append(log, row)

    os.pwrite, JsonLines.append = counted_write, counted_append  # four writes a step
    sys.exit(main(command))


def test_sigkill_at_any_write_costs_the_step_in_flight_only(tmp_path: Path, dataset: Dataset) -> None:
    folder = write_set(tmp_path / "set", dataset)
    options = "--selector loss-percentile --steps 150 --batch-size 32 --threads 1 --evaluate-every 50 --model cnn"
    command = ["train", "--data", str(folder), *options.split(), "--quiet", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    chance, steps = random.Random(7), []
    for writes in (chance.randrange(10, 150) for _ in range(3)):
        ended = processes.run(_killed, writes, [*command, str(tmp_path / "parts"), "--resume"])
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        steps.append(_step(tmp_path / "parts"))
    assert 0 < steps[0] < steps[1] < steps[2] < 150
    assert main([*command, str(tmp_path / "parts"), "--resume"]) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts"), f"killed after steps {steps}"
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "parts")


def test_sigkill_within_a_line_of_the_log(tmp_path: Path, dataset: Dataset) -> None:
    folder = write_set(tmp_path / "set", dataset)
    options = "--selector random --steps 60 --batch-size 32 --threads 1 --evaluate-every 60 --model mlp"
    command = ["train", "--data", str(folder), *options.split(), "--quiet", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    writes = 50 * 4 + 1  # the state before the first step, 49 saved steps, and the row of the first 50
    ended = processes.run(_killed, writes, [*command, str(tmp_path / "parts"), "--resume"])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert _step(tmp_path / "parts") == 49
    assert (tmp_path / "parts" / "log.jsonl").read_bytes().endswith(b'{"kind": "tra')
    assert main([*command, str(tmp_path / "parts"), "--resume"]) == 0
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert log_without_times(tmp_path / "whole") == log_without_times(tmp_path / "parts")


def _step(folder: Path) -> int:
    from selbp_study.journal import Journal

    found = Journal(folder).read()
    assert found is not None
    return found[1]


def test_time_runs_on_between_log_rows(tmp_path: Path, dataset: Dataset, config: RunConfig) -> None:
    """Evaluations inside a window of steps are charged for the steps that it holds so far."""
    ticks = itertools.count()
    run = Run(config, dataset, tmp_path, clock=lambda: float(next(ticks)))  # a step reads it six times, see below
    run.open()
    result = run.execute()
    assert [point["seconds"] for point in result["curve"]] == [0.0, 50.0, 100.0, 150.0]
    # Begin, choosing, chosen, forward's end, backward's end, the step's end: each of its phases is one tick.
    assert result["seconds"] == {phase: 150.0 if phase == "total" else 30.0 for phase in PHASES}
    assert result["clock"] == "process"
