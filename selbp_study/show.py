"""What is seen of runs while they train: a bar, and a line for each that ends."""

from __future__ import annotations

import math
import sys
from typing import Any

from selbp_study.compare import Comparison, Outcome
from selbp_study.config import RunConfig
from selbp_study.data import HELD_OUT


def say(text: str) -> None:
    """One line for the reader, at once."""
    print(text, flush=True)


def new_bar(title: str, unit: str, quiet: bool, **options: Any) -> Any:
    """A progress bar; none where no terminal shows it."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    return tqdm(desc=title, unit=unit, disable=hidden, mininterval=0.2, dynamic_ncols=True, **options)


class Bar:
    """A progress bar of one run, or of several that train in turn: samples a second and the last loss."""

    def __init__(self, name: str, quiet: bool) -> None:
        self.bar = new_bar(name, " samples", quiet, total=0, unit_scale=True, leave=False)

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
        self.arms, self.seeds, self.quiet = len(comparison.arms), list(comparison.seeds), quiet
        self.runs = self.arms * len(self.seeds)
        self.bar: Bar | None = None
        self.going: set[str] = set()  # keys of the runs that train in turn
        self.outcomes: list[Outcome] = []

    def progress(self, config: RunConfig, done: int) -> Bar:
        """One more run begins."""
        if config.dataset.endswith(HELD_OUT):
            title = "rates"
        else:
            first = self.arms * self.seeds.index(config.seed)
            title = f"{first + 1}-{first + self.arms}/{self.runs}, seed {config.seed}"
            self.going.add(config.key())
        if self.bar is None:
            self.bar = Bar(title, self.quiet)
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
        self.going.discard(last.config.key())
        if not self.going:
            self.close()

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
        self.bar = None
