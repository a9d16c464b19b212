"""Runs that train in turn in this process, a few steps each: whatever else the machine does slows all of them alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.engine import Finished, failure, read_back
from selbp_study.run import Run

Advance = Callable[[int, float], None]  # samples, loss
Progress = Callable[[RunConfig, int], Advance]  # a run begins, at this step


def no_progress(_config: RunConfig, _done: int) -> Advance:
    """Show nothing."""
    return lambda _samples, _loss: None


class Turns:
    """A :class:`selbp_study.engine.Runner` for runs on ``data``, whose folders are ``home(config)``.

    Runs with one value of ``group`` train in turn; the next group waits for their ends. Everything that a run leaves
    stays in its folder.
    """

    def __init__(
        self,
        data: Dataset,
        home: Callable[[RunConfig], Path],
        begun: Progress = no_progress,
        group: Callable[[RunConfig], object] = lambda config: config.seed,
    ) -> None:
        self.data, self.home, self.begun, self.group = data, home, begun, group
        self.queue: list[RunConfig] = []
        self.ends: Iterator[Finished] = iter(())  # of the group at work

    def cached(self, config: RunConfig) -> Finished | None:
        """The run, if it was finished before."""
        return read_back(self.home(config), config)

    def submit(self, config: RunConfig) -> None:
        """Have it run in turn with those of its group."""
        self.queue.append(config)

    def next(self) -> Finished:
        """The next run that ends, of those that were submitted."""
        ended = next(self.ends, None)
        if ended is None:
            first = self.group(self.queue[0])
            self.ends = self._side_by_side([config for config in self.queue if self.group(config) == first])
            self.queue = [config for config in self.queue if self.group(config) != first]
            ended = next(self.ends)
        return ended

    def close(self) -> None:
        """Let go of the folders of the group at work."""
        if isinstance(self.ends, Generator):
            self.ends.close()

    def _side_by_side(self, configs: Sequence[RunConfig]) -> Iterator[Finished]:
        """Carry runs to their ends, a few steps of each in turn; each as it ends.

        A run's result does not depend on who takes the other turns. One that raises is out. KeyboardInterrupt ends them
        all, and all can be resumed.
        """
        going: deque[tuple[RunConfig, Generator[None, None, dict[str, Any]]]] = deque()
        try:
            for config in configs:
                try:
                    run = Run(config, self.data, self.home(config))
                    going.append((config, run.turns(self.begun(config, run.open()))))
                except Exception as error:  # a failed run is a line of the table, not the end of the others
                    yield failure(config, self.home(config), error)
            while going:
                config, turns = going.popleft()
                try:
                    next(turns)
                    going.append((config, turns))
                except StopIteration as end:
                    yield Finished(config, end.value)
                except Exception as error:
                    yield failure(config, self.home(config), error)
        finally:
            for _, turns in going:
                turns.close()
