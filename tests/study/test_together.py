"""A run by several processes is the run of one: started, stopped and resumed on any number of them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.run import Run
from selbp_study.storage import JsonLines, StorageError
from selbp_study.together import SharedRun, Together

# Float32 sums of a few hundred gradients in another order, over 30 steps that contract: some units in the last place.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FIGURES = ("step", "kind", "backward_samples")


class Stop(Exception):
    """A kill, as seen from inside the process."""


def train(run: Run, steps: int | None = None) -> None:
    """To the end, or so many steps."""
    run.open()
    left = run.config.steps if steps is None else steps

    def advance(samples: int, loss: float) -> None:
        nonlocal left
        left -= 1
        if left == 0 and steps is not None:
            raise Stop

    try:
        run.execute(advance)
    except Stop:
        assert steps is not None


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def check_same(folder: Path, other: Path, exact: bool = False) -> None:
    """Equal weights, to rounding or to the bit, and nothing lost or counted twice."""
    for name, value in weights(folder).items():
        torch.testing.assert_close(weights(other)[name], value, **({"rtol": 0, "atol": 0} if exact else CLOSE))
    logs = [[{key: row[key] for key in FIGURES} for row in JsonLines(x / "log.jsonl").read()] for x in (folder, other)]
    assert logs[0] == logs[1]
    results = [json.loads((x / "result.json").read_text()) for x in (folder, other)]
    assert [x["backward_samples"] for x in results] == [
        results[0]["steps"] * RunConfig(**results[0]["config"]).kept()
    ] * 2


def _rank(rank: int, size: int, folder: Path, config: RunConfig, data: Dataset) -> None:
    """What torchrun would do, with a file to meet in instead of a port."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    store = torch.distributed.FileStore(str(folder / "meeting"), size)
    importlib.import_module("torch.distributed.rendezvous").rendezvous = lambda url: iter([(store, rank, size)])
    with Together() as together:
        train(SharedRun(config, data, folder / "whole", together))
        train(SharedRun(config, data, folder / "resumed by one", together), 14)
        train(SharedRun(config, data, folder / "begun by one", together))
        ragged = dataclasses.replace(config, batch_size=31, keep=7, selector="random")
        train(SharedRun(ragged, data, folder / "ragged", together))
        with pytest.raises(StorageError, match="holds another run") as caught:
            SharedRun(ragged, data, folder / "whole", together).open()
        assert getattr(caught.value, "told", False) == (rank > 0)
        assert together.in_turn(lambda: rank) == rank
        with pytest.raises(ValueError, match="at least as many samples, got 1"):
            SharedRun(dataclasses.replace(config, batch_size=1), data, folder, together)
        drawn = dataclasses.replace(config, selector="full", options="sampling=scored,pool=64")
        with pytest.raises(ValueError, match="draws by a table of scores runs in one process"):
            SharedRun(drawn, data, folder, together)
        torch.distributed.barrier()
    os._exit(0)


def test_two_processes_and_one(tmp_path: Path, config: RunConfig, dataset: Dataset) -> None:
    train(Run(config, dataset, tmp_path / "alone"))
    ragged = dataclasses.replace(config, batch_size=31, keep=7, selector="random")
    train(Run(ragged, dataset, tmp_path / "ragged alone"))
    train(Run(config, dataset, tmp_path / "begun by one"), 14)
    multiprocessing.spawn(_rank, (2, tmp_path, config, dataset), nprocs=2)
    resumed = Run(config, dataset, tmp_path / "resumed by one")
    assert resumed.open() == 14
    resumed.execute()
    check_same(tmp_path / "alone", tmp_path / "whole")
    check_same(tmp_path / "alone", tmp_path / "resumed by one")
    check_same(tmp_path / "alone", tmp_path / "begun by one")
    check_same(tmp_path / "ragged alone", tmp_path / "ragged")


# The command, in which process number r of 4 is killed in step s of the i-th start, for the i-th of KILLS.
KILLS = [(1, 3), (0, 5), (3, 5), (2, 9), (0, 10), (1, 17), (3, 18), (2, 24), (0, 25), (1, 29)]
PROGRAM = f"""
import os, signal, sys
from selbp_study.launch import main
from selbp_study.run import Run
start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank, step = ({KILLS} + [(-1, -1)])[start] if len(sys.argv) > 1 and "--killed" in sys.argv else (-1, -1)
if "--killed" in sys.argv:
    sys.argv.remove("--killed")
real = Run.train_step
def train_step(self):
    if self.step == step and int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self)
Run.train_step = train_step
sys.exit(main())
"""


def torchrun(program: Path, folder: Path, *more: str, size: int = 4) -> str:
    options = [
        "--standalone",
        "--nproc-per-node",
        str(size),
        "--max-restarts",
        str(len(KILLS)),
        "--monitor-interval",
        ".1",
    ]
    train = "train --dataset digits --model mlp --selector matching --steps 30 --batch-size 60 --keep 16".split()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *options,
        str(program),
        *train,
        "--quiet",
        "--out",
        str(folder),
    ]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    """The agent starts all four processes again after each kill; they go on from the step that was in flight."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    torchrun(program, tmp_path / "whole")
    said = torchrun(program, tmp_path / "killed", "--killed")
    found = [int(line.split()[4]) for line in said.splitlines() if line.startswith("going on")]
    # Where another process than the first is killed, the first may still be writing the state after the step before.
    assert len(found) == len(KILLS)
    assert all(step - (rank > 0) <= at <= step for at, (rank, step) in zip(found, KILLS, strict=True)), found
    check_same(tmp_path / "whole", tmp_path / "killed", exact=True)


def test_the_module_that_torchrun_starts_is_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selbp", "--version"])
    monkeypatch.setattr("selbp.keep_freed_memory", lambda: True)  # it would act on all tests that follow
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("selbp_study", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("selbp ")


def test_a_shared_run_takes_no_look_at_the_price(
    tmp_path: Path, config: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selbp.training.pace.STEPS", 10)  # the tests take none
    for run in (Run(config, dataset, tmp_path), SharedRun(config, dataset, tmp_path, Together())):
        assert run.wrapper._pace.done and run.wrapper.clock is run.clock
