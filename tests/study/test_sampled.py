"""Runs whose samples a table draws: resumable to the bit, charged for the proxy, each way as it says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from selbp.sampling import ScoreTable
from selbp.sampling.known import Suspects
from selbp_study.arms import ARMS, Arm
from selbp_study.cli import main
from selbp_study.config import RunConfig
from selbp_study.costs import ONCE, Cost, measure, steps_within
from selbp_study.data import load, resolve
from selbp_study.protocols import PROTOCOLS, Cell, Protocol
from selbp_study.run import Run
from selbp_study.sampled import WAYS, SampledOrder, Sampling
from selbp_study.suspects import write

NAMED = ["scored", "auto", "aware-random", "scored-history", "scored-proxy", "info-batch", "rho-loss"]


class Stop(Exception):
    """A kill, as seen from inside the process."""


def config_of(config, name, **changes):
    arm = dataclasses.replace(Arm.parse(name), keep=8, lr=0.1)
    return dataclasses.replace(arm.config(dataclasses.replace(config, batch_size=32), 3), **changes)


def finish(config, data, folder: Path) -> Run:
    run = Run(config, data, folder)
    run.open()
    run.execute()
    return run


@pytest.mark.parametrize("name", NAMED)
def test_a_resumed_run_is_the_run(config, dataset, tmp_path, name):
    wanted = config_of(config, name)
    whole = finish(wanted, dataset, tmp_path / "whole")
    cut = Run(wanted, dataset, tmp_path / "cut")
    cut.open()

    def stop(samples: int, loss: float, left=[17]) -> None:  # noqa: B006  (counts over the calls)
        left[0] -= 1
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        cut.execute(stop)
    again = Run(wanted, dataset, tmp_path / "cut")
    assert 0 < again.open() < wanted.steps
    again.execute()
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert isinstance(again.order, SampledOrder) and isinstance(whole.order, SampledOrder)
    mine, theirs = again.order.table.probability, whole.order.table.probability
    torch.testing.assert_close(mine, theirs, rtol=0.0, atol=0.0, equal_nan=True)


def test_history_is_written_and_the_proxy_fills_the_table(config, dataset, tmp_path):
    seen = {name: finish(config_of(config, name), dataset, tmp_path / name).order.table for name in NAMED[:5]}
    assert torch.isfinite(seen["scored"].probability).all() and torch.isfinite(seen["scored-proxy"].probability).all()
    assert not torch.isfinite(seen["scored-history"].probability).all()
    assert torch.isfinite(seen["scored-history"].probability).any()


def test_a_step_reads_what_the_arm_keeps(config, dataset, tmp_path):
    for name, rows in (("scored", 8), ("auto", 8), ("rho-loss", 128)):
        run = Run(config_of(config, name), dataset, tmp_path / name)
        assert len(run.order.indices(0)) == rows, name
    trained = finish(config_of(config, "rho-loss"), dataset, tmp_path / "rho")
    assert trained.backward_samples == 8 * trained.step


IMPORTS = """
import sys
from selbp_study.sampled import SampledOrder, Sampling
from selbp_study.config import RunConfig
from selbp_study.data import load

seen = []

def clock():
    seen.append({name for name in sys.modules if name.startswith(("torch._dynamo", "sympy"))})
    return float(len(seen))

data = load("digits")
config = RunConfig("digits", data.fingerprint, "full", 4, 0.1, keep=16, threads=1)
order = SampledOrder(Sampling("auto", passes=1), config, data.train, data.n_classes, clock)
assert len(seen) == 2 and order.proxy_seconds == 1.0
print(sorted(seen[1] - seen[0]))
"""


def test_the_proxys_seconds_hold_no_import():
    made = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "[]"


def test_rho_on_a_text_is_refused(config, text, tmp_path):
    wanted = config_of(config, "rho-loss", dataset=text.name, fingerprint=text.fingerprint, model="transformer")
    with pytest.raises(ValueError, match="sampling=rho needs a proxy and one class a sample"):
        Run(wanted, text, tmp_path)


@pytest.mark.parametrize("name", ["auto", "rho-loss", "scored-plain-loss"])
def test_the_log_gives_no_accuracy_where_the_loss_says_none(config, dataset, tmp_path, name):
    run = finish(config_of(config, name), dataset, tmp_path)
    logged = [row["accuracy"] for row in run.log.read() if row["kind"] == "train"]
    assert logged and all(value is None if name == "auto" else 0 <= value <= 100 for value in logged)
    assert (run.wrapper.report.accuracy is None) == (name == "auto")


def test_what_is_paid_once_comes_out_of_the_budget(config, dataset):
    costs = measure({"auto": config_of(config, "auto"), "random": config}, dataset, rounds=2)
    assert costs["auto"].phases[ONCE] > 0 and ONCE not in costs["random"].phases
    assert steps_within(100.0, Cost(2.0, 2.0, 2.0, {})) == 50
    assert steps_within(100.0, Cost(2.0, 2.0, 2.0, {ONCE: 20.0})) == 40


def test_the_controller_says_why(config, dataset, tmp_path):
    run = finish(config_of(config, "auto", steps=230), dataset, tmp_path)
    assert run.order.controller.log, "it has decided"
    assert all(entry.chosen in ("random", "drawn") and entry.why for entry in run.order.controller.log)


def test_a_text_is_drawn_without_classes(config, text, tmp_path):
    wanted = config_of(config, "auto", dataset=text.name, fingerprint=text.fingerprint, model="transformer")
    assert finish(wanted, text, tmp_path).order.table.classes is None


def test_train_writes_what_is_thought_mislabelled(tmp_path, capsys):
    out = tmp_path / "run"
    command = ["train", "--selector", "scored", "--dataset", "digits", "--steps", "60", "--keep", "16", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    assert "samples thought mislabelled" in capsys.readouterr().out
    head, *rows = (out / "suspects.csv").read_text().splitlines()
    assert head == "id,given_label,probable_label,probability"
    for row in rows:
        number, given, probable, chance = row.split(",")
        assert given != probable and 0.5 <= float(chance) <= 1 and 0 <= int(number) < 1438
    page = (out / "scores.html").read_text()
    assert "headroom and noise share" in page and 'name="viewport"' in page
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any(row.get("noise_share") is not None for row in logged)


def test_the_page_lists_suspects_where_there_are_some(dataset, tmp_path, monkeypatch):
    table = ScoreTable(len(dataset.train), dataset.n_classes)
    for columns, wanted in (([[]] * 4, False), ([[3], [1], [2], [0.75]], True)):
        monkeypatch.setattr(table, "suspects", lambda _n, found=columns: Suspects(*map(torch.tensor, found)))
        _, page = write(tmp_path, table, dataset, [], with_page=True)
        text = page.read_text()
        assert f"{len(columns[0])} of {len(table)} samples are thought mislabelled" in text
        assert ("most suspect" in text) == wanted == ("3: given 1, probably 2 (75%)" in text)


def test_suspects_find_planted_errors(tmp_path):
    """Of labels that were turned into another class, most are found, and most that is found was turned."""
    clean, noisy = load("digits"), resolve("digits+noise=0.2")
    config = RunConfig(
        dataset=noisy.name,
        fingerprint=noisy.fingerprint,
        selector="full",
        steps=300,
        lr=0.1,
        model="mlp",
        threads=1,
        options="sampling=scored",
        keep=48,
        journal_every=1000,
    )
    run = finish(config, noisy, tmp_path)
    planted = clean.train.labels != noisy.train.labels
    found = torch.zeros_like(planted)
    listed = run.order.table.suspects(len(planted))
    found[listed.ids[listed.probability >= 0.5]] = True
    right = float((found & planted).sum())
    assert right / float(found.sum()) > 0.85 and right / float(planted.sum()) > 0.75


@pytest.mark.parametrize("name", [name for name, (_, spec) in ARMS.items() if "sampling=" in spec])
def test_every_arm_is_one(name):
    arm = Arm.parse(name)
    own, rest = Sampling.split(dict(part.split("=") for part in arm.options.split(",")))
    assert own is not None and own.sampling in WAYS and rest == {}
    assert Arm.parse(arm.name).name == arm.name


def test_wrong_options_say_what_is_wrong(config, dataset, tmp_path):
    wrong = dataclasses.replace(config, selector="full", options="sampling=best")
    with pytest.raises(ValueError, match="sampling must be one of scored, uniform, auto, info-batch, rho, got 'best'"):
        Run(wrong, dataset, tmp_path)
    with pytest.raises(ValueError, match="an arm whose keep is tuned is one of the arms"):
        Protocol("p", "p", (Cell("digits", "mlp", 3),), ("random",), (0,), tuned_keeps=("auto",))
    with pytest.raises(ValueError, match="a cell has one keep"):
        Protocol("p", "p", (Cell("digits", "mlp", 3, (1, 2)),), ("random", "auto"), (0,), tuned_keeps=("auto",))


def test_the_confirmation_is_of_fresh_seeds():
    others = {seed for name, one in PROTOCOLS.items() if not name.startswith("confirm-auto") for seed in one.seeds}
    confirming = [one for name, one in PROTOCOLS.items() if name.startswith("confirm-auto")]
    assert confirming and not others & {seed for one in confirming for seed in one.seeds}
