"""Worker processes: a killed one costs its run nothing but time, a failed run costs the others nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from support import processes
from support.images import small_dataset, write_set

from selbp_study import pool as module
from selbp_study.config import RunConfig
from selbp_study.data import Dataset, resolve
from selbp_study.journal import Journal
from selbp_study.pool import Pool, pool, run_to_end


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that a worker reads: sklearn's digits would have each import sklearn."""
    return write_set(tmp_path_factory.mktemp("set"), small_dataset())


@pytest.fixture(scope="module")
def data(images: Path) -> Dataset:
    return resolve("fashion-mnist", images)


@pytest.fixture
def run(data: Dataset) -> RunConfig:
    return RunConfig(
        dataset=data.name,
        fingerprint=data.fingerprint,
        selector="random",
        steps=20,
        lr=0.1,
        model="mlp",
        evaluate_every=20,
        threads=1,
    )


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that start at once; one test starts them as a study does."""
    context = processes.context()
    monkeypatch.setattr(module.multiprocessing, "get_context", lambda _: context)


def test_runs_in_processes_end_as_runs_in_this_one(tmp_path: Path, run: RunConfig, images: Path) -> None:
    configs = [dataclasses.replace(run, seed=seed) for seed in range(3)]
    configs.append(dataclasses.replace(run, lr=1e30))
    results = []
    for workers in (0, 2):
        with pool(workers, tmp_path / str(workers), images) as made:
            for config in configs:
                made.submit(config)
            found = {}
            while len(made):
                finished = made.next()
                found[finished.config.key()] = finished
        results.append([found[config.key()] for config in configs])
    for here, there in zip(*results, strict=True):
        assert (here.result or {}).get("accuracy") == (there.result or {}).get("accuracy")
    assert results[1][3].result is None and "no longer finite" in (results[1][3].error or "")
    home = tmp_path / "2" / "runs" / configs[0].key()
    assert {path.name for path in home.iterdir()} == {"config.json", "result.json"}
    there = Pool(0, tmp_path / "2", images)
    assert there.cached(configs[0]).result == results[1][0].result
    assert there.cached(configs[3]) is None and there.cached(dataclasses.replace(run, seed=9)) is None


def _dies_once(pipe, folder: Path, data_folder) -> None:
    """A worker that is killed at its second saved state, unless one was."""
    write, marker, calls = Journal.write, folder / "killed", []

    def dying(journal: Journal, state, sequence: int) -> None:
        calls.append(sequence)
        write(journal, state, sequence)
        if len(calls) == 2 and not marker.exists():
            marker.write_text(str(sequence))
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.write = dying
    module._work(pipe, folder, data_folder)


def test_a_killed_worker_is_replaced_and_its_run_goes_on(
    tmp_path: Path, run: RunConfig, images: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    run = dataclasses.replace(run, steps=400, evaluate_every=400, journal_every=50)
    monkeypatch.setattr(module, "_work", _dies_once)
    with pool(1, tmp_path, images) as made:
        made.submit(run)
        finished = made.next()
    assert (tmp_path / "killed").read_text() == "100"
    assert finished.error is None and finished.result["steps"] == 400
    with pool(0, tmp_path / "whole", images) as made:
        made.submit(run)
        assert made.next().result["accuracy"] == finished.result["accuracy"]


def _die(_pipe, _folder, _data) -> None:
    os._exit(7)


def test_a_run_that_kills_every_worker_is_a_failure(
    tmp_path: Path, run: RunConfig, images: Path, monkeypatch: pytest.MonkeyPatch, forked: None
) -> None:
    monkeypatch.setattr(module, "_work", _die)
    with pool(1, tmp_path, images) as made:
        made.submit(run)
        finished = made.next()
    assert finished.result is None and "died 3 times, last with status 7" in (finished.error or "")
    assert len(made) == 0


def test_other_data_than_planned_is_refused(tmp_path: Path, run: RunConfig, data: Dataset) -> None:
    finished = run_to_end(dataclasses.replace(run, fingerprint="0" * 16), data, tmp_path)
    assert "not the data" in (finished.error or "")
    assert (tmp_path / "runs" / finished.config.key() / "error.txt").exists()


def test_data_that_cannot_be_had_is_a_failure(tmp_path: Path, run: RunConfig, forked: None) -> None:
    made = Pool(1, tmp_path, tmp_path / "nowhere")
    made.submit(dataclasses.replace(run, dataset="fashion-mnist"))
    try:
        assert "no such folder" in (made.next().error or "")
    finally:
        made.close()
