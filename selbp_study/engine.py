"""The engine under ``selbp compare`` and ``selbp study``: jobs that want runs, and runners that carry the runs out.

A job is a generator. It yields the runs it wants and is sent how they ended. Jobs go forward side by side. A run that
several jobs want, or that was finished before, is done once.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from selbp_study.config import RunConfig
from selbp_study.folder import finished as finished_result
from selbp_study.run import Diverged
from selbp_study.storage import StorageError, write_text
from selbp_study.tuning import Choice, Search

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Finished:
    """A run's result, or why there is none; ``cached`` where it was finished before."""

    config: RunConfig
    result: dict[str, Any] | None
    error: str | None = None
    cached: bool = False


Job = Generator[list[RunConfig], list[Finished], T]


class Runner(Protocol):
    """What carries runs out: processes (:class:`selbp_study.pool.Pool`) or turns (:class:`selbp_study.turns.Turns`)."""

    def cached(self, config: RunConfig) -> Finished | None:
        """The run, if it was finished before."""

    def submit(self, config: RunConfig) -> None:
        """Have it run after those that were submitted before."""

    def next(self) -> Finished:
        """The next run that ends, of those that were submitted."""


def read_back(home: Path, config: RunConfig) -> Finished | None:
    """The finished run in ``home``; its error, if what is there cannot be believed; None where it is not finished."""
    try:
        result = finished_result(home, config)
    except StorageError as error:
        return failure(config, home, error)
    return None if result is None else Finished(config, result, cached=True)


def failure(config: RunConfig, home: Path, error: Exception) -> Finished:
    """The end of a run that raised ``error``. The traceback goes to ``home``, if the folder takes it."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_text(home / "error.txt", "".join(traceback.format_exception(error)))
    except OSError:
        pass  # a folder that is none: the reason says so
    known = isinstance(error, (ValueError, Diverged, StorageError))
    return Finished(config, None, str(error) if known else f"{type(error).__name__}: {error}")


def searched(search: Search, trial: Callable[[float | int, float, int], RunConfig]) -> Job[Choice]:
    """A job that answers ``search`` with held-out accuracies; ``trial(keep, rate, seed)`` makes the runs."""
    trials = next(search)
    while True:
        found = yield [trial(*asked) for asked in trials]
        try:
            trials = search.send([float("-inf") if one.result is None else one.result["accuracy"] for one in found])
        except StopIteration as stop:
            choice: Choice = stop.value
            return choice


def drive(
    jobs: Mapping[str, Job[T]],
    runner: Runner,
    *,
    progress: Callable[[int, int], None] = lambda done, known: None,
    on_end: Callable[[Finished], None] = lambda finished: None,
    say: Say = lambda text: None,
) -> dict[str, T | str]:
    """Carry all jobs to their end; a job that raises ValueError yields its error as text.

    ``progress`` counts runs; ``on_end`` is told of each run that ends, or that was finished before.
    """
    results: dict[str, Finished] = {}
    waiting: dict[str, tuple[Job[T], list[RunConfig]]] = {}
    asked: set[str] = set()
    ended: dict[str, T | str] = {}

    def step(name: str, job: Job[T], answer: list[Finished] | None) -> None:
        """Forward until the job wants runs that are not there."""
        while True:
            try:
                configs = next(job) if answer is None else job.send(answer)
            except StopIteration as stop:
                ended[name] = stop.value
                return
            except ValueError as error:
                say(f"{name}: {error}")
                ended[name] = str(error)
                return
            for config in configs:
                key = config.key()
                if key not in asked:
                    asked.add(key)
                    found = runner.cached(config)
                    if found is None:
                        runner.submit(config)
                    else:
                        results[key] = found
                        on_end(found)
            if any(config.key() not in results for config in configs):
                waiting[name] = (job, configs)
                return
            answer = [results[config.key()] for config in configs]

    for name, job in jobs.items():
        step(name, job, None)
    while waiting:
        progress(len(results), len(asked))
        finished = runner.next()
        results[finished.config.key()] = finished
        on_end(finished)
        for name, (job, configs) in list(waiting.items()):
            if all(config.key() in results for config in configs):
                del waiting[name]
                step(name, job, [results[config.key()] for config in configs])
    progress(len(results), len(results))
    return ended
