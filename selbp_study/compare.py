"""A comparison: arms by seeds, one cached run each; a failed run never takes another with it."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selbp_study.arms import Arm
from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.folder import finished as finished_result
from selbp_study.run import Diverged, Run
from selbp_study.storage import StorageError, write_text

BUDGETS = ("steps", "samples", "time")


@dataclass(frozen=True)
class Comparison:
    """Arms by seeds under one budget; ``base`` gives what they share.

    ``budget="steps"`` gives every arm ``base.steps`` steps; ``"samples"`` gives every arm the backward samples that
    ``base.steps`` steps at ``base.keep`` take, so that the full batch gets fewer steps; ``"time"`` gives every arm the
    steps that fit in ``milliseconds`` at its cost of a step. Each run decays its own rate.
    """

    base: RunConfig
    arms: Sequence[Arm]
    seeds: Sequence[int] = (0,)
    budget: str = "steps"
    costs: Mapping[str, float] = field(default_factory=dict)  # milliseconds of a step, by the arm's name
    milliseconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise ValueError("a comparison needs at least one arm and one seed")
        if self.budget not in BUDGETS:
            raise ValueError(f"budget must be one of {', '.join(BUDGETS)}, got {self.budget!r}")
        for name, values in (
            ("arm", [arm.name for arm in self.arms]),
            ("seed", [str(seed) for seed in self.seeds]),
        ):
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ValueError(f"{name} {repeated[0]} is given twice")

    def config(self, arm: Arm, seed: int) -> RunConfig:
        """The configuration of one run."""
        config = arm.config(self.base, seed)
        if self.budget != "steps":
            if self.budget == "samples":
                steps = max(1, round(self.base.steps * self.base.kept() / config.kept()))
            else:
                steps = max(1, int(self.milliseconds / self.costs[arm.name] + 1e-9))
            every = max(1, round(self.base.evaluate_every * steps / self.base.steps))
            config = replace(config, steps=steps, evaluate_every=every)
        return config

    def timed(self, costs: Mapping[str, float]) -> Comparison:
        """The comparison with a budget of time: what the dearest arm but the full batch takes for its steps."""
        selecting = [costs[arm.name] for arm in self.arms if arm.config(self.base, 0).kept() < self.base.batch_size]
        longest = max(selecting or costs.values())
        return replace(self, budget="time", costs=costs, milliseconds=self.base.steps * longest)

    def runs(self) -> Iterator[tuple[Arm, RunConfig]]:
        """Every run, seed by seed: a comparison that is stopped has whole seeds to compare."""
        for seed in self.seeds:
            for arm in self.arms:
                yield arm, self.config(arm, seed)


@dataclass
class Outcome:
    """What became of one run: a result or the reason why there is none."""

    arm: Arm
    config: RunConfig
    result: dict[str, Any] | None = None
    error: str | None = None
    cached: bool = field(default=False, compare=False)


Progress = Callable[[int, int, Arm, RunConfig, int], Callable[[int, float], None]]


def no_progress(_index: int, _total: int, _arm: Arm, _config: RunConfig, _done: int) -> Callable[[int, float], None]:
    """Show nothing."""
    return lambda _samples, _loss: None


def run_folder(folder: Path, arm: Arm, config: RunConfig) -> Path:
    """Where a run of a comparison lives; its name ends with the key, so that it is found again by its configuration."""
    name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in arm.name)
    return folder / "runs" / f"{name}-seed{config.seed}-{config.key()}"


def failure(arm: Arm, config: RunConfig, home: Path, error: Exception) -> Outcome:
    """The outcome of a run that raised ``error``; where it came from is kept beside it, if the folder takes it."""
    trace = "".join(traceback.format_exception(error))
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_text(home / "error.txt", trace)
    except OSError:
        pass  # a folder that is none: the reason says so
    known = isinstance(error, (ValueError, Diverged, StorageError))
    return Outcome(arm, config, error=str(error) if known else f"{type(error).__name__}: {error}")


def side_by_side(
    runs: Sequence[tuple[Arm, RunConfig]],
    data: Dataset,
    folder: Path,
    advance: Callable[[Arm, RunConfig, int], Callable[[int, float], None]],
) -> Iterator[Outcome]:
    """Carry ``runs`` to their ends, a few steps of each in turn; the outcome of each as it ends.

    In turn, so that whatever else the machine does slows all of them alike. A run's result does not depend on who
    takes the other turns. One that raises is out; KeyboardInterrupt ends them all, and all can be resumed.
    """
    going: deque[tuple[Arm, RunConfig, Path, Generator[None, None, dict[str, Any]]]] = deque()
    try:
        for arm, config in runs:
            home = run_folder(folder, arm, config)
            try:
                result = finished_result(home, config)
                if result is None:
                    run = Run(config, data, home)
                    going.append((arm, config, home, run.turns(advance(arm, config, run.open()))))
                    continue
                yield Outcome(arm, config, result, cached=True)
            except Exception as error:  # a failed arm is a line of the table, not the end of the others
                yield failure(arm, config, home, error)
        while going:
            arm, config, home, turns = going.popleft()
            try:
                next(turns)
                going.append((arm, config, home, turns))
            except StopIteration as end:
                yield Outcome(arm, config, end.value)
            except Exception as error:
                yield failure(arm, config, home, error)
    finally:
        for _, _, _, turns in going:
            turns.close()


def run_all(
    comparison: Comparison,
    data: Dataset,
    folder: Path,
    *,
    progress: Progress = no_progress,
    finished: Callable[[list[Outcome], Outcome], None] = lambda outcomes, last: None,
) -> list[Outcome]:
    """Every run of ``comparison``; those that are finished in ``folder`` are read, the rest carried on.

    The arms of a seed train in turn (:func:`side_by_side`). ``finished`` is called after each run with what there is,
    in the order of :meth:`Comparison.runs`, and with the newest of it. KeyboardInterrupt passes through: the next call
    goes on from the steps that were in flight.
    """
    runs = list(comparison.runs())
    places = {(arm.name, config.seed): place for place, (arm, config) in enumerate(runs)}
    found: dict[int, Outcome] = {}

    def advance(arm: Arm, config: RunConfig, done: int) -> Callable[[int, float], None]:
        return progress(places[arm.name, config.seed], len(runs), arm, config, done)

    for seed in comparison.seeds:
        group = [(arm, config) for arm, config in runs if config.seed == seed]
        for outcome in side_by_side(group, data, folder, advance):
            found[places[outcome.arm.name, outcome.config.seed]] = outcome
            finished([found[place] for place in sorted(found)], outcome)
    return [found[place] for place in sorted(found)]


def tune(
    comparison: Comparison, rates: Sequence[float], data: Dataset, folder: Path, *, progress: Progress = no_progress
) -> tuple[Comparison, dict[str, dict[float, float]]]:
    """``comparison`` with each arm's best of ``rates``, and the mean accuracies that decided, by arm and rate.

    The rates are judged on a tenth of the *training* data that is held out; the test part is never read. The seeds
    (1000, 1001) are none that a comparison reports by default. A rate at which a run fails is out.
    """
    held_out = data.held_out(0.1)
    base = replace(comparison.base, dataset=held_out.name, fingerprint=held_out.fingerprint)
    arms, scores = [], {}
    for arm in comparison.arms:
        score: dict[float, float] = {}
        for rate in rates:
            trial = replace(comparison, base=base, arms=[replace(arm, lr=rate)], seeds=(1000, 1001))
            outcomes = run_all(trial, held_out, folder / "tuning", progress=progress)
            if all(outcome.result is not None for outcome in outcomes):
                score[rate] = sum(outcome.result["accuracy"] for outcome in outcomes if outcome.result) / len(outcomes)
        if not score:
            raise ValueError(f"{arm.label} fails at every one of the rates {list(rates)}")
        arms.append(replace(arm, lr=max(score, key=lambda rate: score[rate])))
        scores[arm.name] = score
    return replace(comparison, arms=arms), scores
