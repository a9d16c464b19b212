"""What is seen of runs while they train: a bar, and a line for each that ends."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from selbp_study.arms import Arm
from selbp_study.compare import Comparison, Outcome
from selbp_study.config import RunConfig


def say(text: str) -> None:
    """One line for the reader, at once."""
    print(text, flush=True)


class Bar:
    """A progress bar of one run, or of several that train in turn: samples a second and the last loss."""

    def __init__(self, name: str, quiet: bool) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=0,
            desc=name,
            unit=" samples",
            unit_scale=True,
            disable=quiet,
            mininterval=0.2 if sys.stderr.isatty() else 15.0,
            leave=False,
            dynamic_ncols=True,
        )

    def add(self, config: RunConfig, done: int) -> Bar:
        """One more run, which stands at step ``done``."""
        if not self.bar.disable:
            self.bar.total += config.steps * config.batch_size
            self.bar.initial += done * config.batch_size  # what the speed does not count
            self.bar.update(done * config.batch_size)
        return self

    def __call__(self, samples: int, loss: float) -> None:
        """Advance."""
        if not math.isnan(loss):
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        self.bar.update(samples)

    def say(self, text: str) -> None:
        """One line above it, at once."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Take it off the screen."""
        self.bar.close()


class Show:
    """What is seen of a comparison while it runs: a bar for the runs that train in turn, a line for each that ends."""

    def __init__(self, comparison: Comparison, quiet: bool) -> None:
        self.arms, self.runs, self.quiet = len(comparison.arms), len(comparison.arms) * len(comparison.seeds), quiet
        self.bar: Bar | None = None
        self.outcomes: list[Outcome] = []

    def progress(self, index: int, total: int, arm: Arm, config: RunConfig, done: int) -> Callable[[int, float], None]:
        """One more run begins."""
        if self.bar is None:
            first = index - index % self.arms
            self.bar = Bar(f"{first + 1}-{min(total, first + self.arms)}/{total}, seed {config.seed}", self.quiet)
        return self.bar.add(config, done)

    def finished(self, outcomes: list[Outcome], last: Outcome) -> None:
        """A run has ended."""
        self.outcomes = outcomes
        where = f"{len(outcomes)}/{self.runs} {last.arm.label}, seed {last.config.seed}"
        if last.result is None:
            text = f"{where}: failed: {last.error}"
        else:
            text = (
                f"{where}: {last.result['accuracy']:.2f} % in {last.result['seconds']['total']:.1f} s"
                f"{' (from before)' if last.cached else ''}"
            )
        if self.bar is None:
            say(text)
        else:
            self.bar.say(text)
        if len(outcomes) % self.arms == 0:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
