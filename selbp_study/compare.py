"""A comparison: arms by seeds, one cached run each; a failed run never takes another with it.

Its runs are one job of :mod:`selbp_study.engine`, and each arm's search for a rate is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from selbp_study.arms import Arm
from selbp_study.config import RunConfig
from selbp_study.costs import Costs, steps_of
from selbp_study.data import Dataset
from selbp_study.engine import Finished, Job, drive, searched
from selbp_study.folder import read_compared
from selbp_study.protocols import BUDGETS
from selbp_study.tuning import grid, tuning_config
from selbp_study.turns import Progress, Turns, no_progress


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
    costs: Costs | None = None  # of a step of each arm, for a budget of time
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
        steps = steps_of(self.budget, self.base, config, self.costs, self.milliseconds, arm.share)
        every = max(1, round(self.base.evaluate_every * steps / self.base.steps))
        return replace(config, steps=steps, evaluate_every=every)

    def timed(self, costs: Costs) -> Comparison:
        """The comparison with a budget of time: what the dearest arm but the full batch takes for its steps."""
        configs = [arm.config(self.base, 0) for arm in self.arms]
        selecting = [config for config in configs if config.kept() < self.base.batch_size]
        longest = max(costs[config].median for config in selecting or configs)
        return replace(self, budget="time", costs=costs, milliseconds=self.base.steps * longest)

    def runs(self) -> Iterator[tuple[Arm, RunConfig]]:
        """Every run, seed by seed: a comparison that is stopped has whole seeds to compare."""
        for seed in self.seeds:
            for arm in self.arms:
                yield arm, self.config(arm, seed)


@dataclass(frozen=True, kw_only=True)
class Outcome(Finished):
    """What became of one run of an arm."""

    arm: Arm


def run_folder(folder: Path, arm: Arm, config: RunConfig) -> Path:
    """Where a run of a comparison lives; its name ends with the key, so that it is found again by its configuration."""
    name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in arm.name)
    return folder / "runs" / f"{name}-seed{config.seed}-{config.key()}"


def lost_runs(comparison: Comparison, folder: Path, undecided: Sequence[str] = ()) -> list[str]:
    """The runs that the report in ``folder`` has and that of ``comparison`` would not have, each in words.

    Fields that are ``undecided`` yet, such as a rate that is to be tuned, count as equal.
    """
    configs = [config for _, config in comparison.runs()]
    lost = []
    for label, before in read_compared(folder):
        alike = [replace(config, **{name: getattr(before, name) for name in undecided}) for config in configs]
        if before in alike:
            continue
        nearest = min((before.differences(config) for config in alike), key=len)
        own = any(text.startswith(("selector:", "seed:")) for text in nearest)  # another arm, not another setting
        lost.append(f"{label}, seed {before.seed}" + ("" if own else f" ({'; '.join(nearest)})"))
    return lost


def run_all(
    comparison: Comparison,
    data: Dataset,
    folder: Path,
    *,
    progress: Progress = no_progress,
    finished: Callable[[list[Outcome], Outcome], None] = lambda outcomes, last: None,
) -> list[Outcome]:
    """Every run of ``comparison``; those that are finished in ``folder`` are read, the rest carried on.

    The arms of a seed train in turn (:class:`selbp_study.turns.Turns`). ``finished`` is called after each run with what
    there is, in the order of :meth:`Comparison.runs`, and with the newest of it. KeyboardInterrupt passes through: the
    next call goes on from the steps that were in flight.
    """
    runs = list(comparison.runs())
    arms = {config.key(): arm for arm, config in reversed(runs)}  # the first arm, where several want the same run
    keys = [(arm, config.key()) for arm, config in runs]
    found: dict[str, Finished] = {}

    def of_arm(arm: Arm, run: Finished) -> Outcome:
        return Outcome(run.config, run.result, run.error, run.cached, arm=arm)

    def outcomes() -> list[Outcome]:
        return [of_arm(arm, found[key]) for arm, key in keys if key in found]

    def on_end(run: Finished) -> None:
        key = run.config.key()
        found[key] = run
        finished(outcomes(), of_arm(arms[key], run))

    def job() -> Job[None]:
        yield [config for _, config in runs]

    turns = Turns(data, lambda config: run_folder(folder, arms[config.key()], config), progress)
    with closing(turns):
        drive({"comparison": job()}, turns, on_end=on_end)
    return outcomes()


def tune(
    comparison: Comparison, rates: Sequence[float], data: Dataset, folder: Path, *, progress: Progress = no_progress
) -> tuple[Comparison, dict[str, dict[float, float]]]:
    """``comparison`` with each arm's best of ``rates``, and the mean accuracies that decided, by arm and rate.

    The rates are judged on a tenth of the *training* data that is held out; the test part is never read. The seeds
    (1000, 1001) are none that a comparison reports by default. A rate at which a run fails is out.
    """
    held_out = data.held_out()
    arms, scores = [], {}
    for arm in comparison.arms:
        config = comparison.config(arm, 0)

        def home(trial: RunConfig, arm: Arm = arm) -> Path:
            return run_folder(folder / "tuning", arm, trial)

        def trial(keep: float | int, lr: float, seed: int, config: RunConfig = config) -> RunConfig:
            # Evaluated as often as the comparison's own runs, though only the end counts: this is how it is cached.
            return replace(tuning_config(config, held_out, keep, lr, seed), evaluate_every=config.evaluate_every)

        job = searched(grid(config.keep, rates), trial)
        choice = drive({arm.name: job}, Turns(held_out, home, progress, RunConfig.key))[arm.name]
        if isinstance(choice, str):
            raise ValueError(f"{arm.label} fails at every one of the rates {list(rates)}")
        arms.append(replace(arm, lr=choice.lr))
        scores[arm.name] = {rate: mean for _, rate, mean, _ in choice.tried}
    return replace(comparison, arms=arms), scores
