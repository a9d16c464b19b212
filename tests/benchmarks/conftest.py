"""A clock that only the test turns: measurements of it are exact, however busy the machine is."""

from __future__ import annotations

import pytest

from benchmarks import harness


class Ticker:
    """Stands for the module ``time``: :meth:`work` takes time of the process, :meth:`wait` passes without."""

    def __init__(self) -> None:
        self.worked = self.waited = 0.0

    def perf_counter(self) -> float:
        return self.worked + self.waited

    def process_time(self) -> float:
        return self.worked

    def work(self, seconds: float) -> None:
        self.worked += seconds

    def wait(self, seconds: float) -> None:
        self.waited += seconds


@pytest.fixture
def ticker(monkeypatch: pytest.MonkeyPatch) -> Ticker:
    made = Ticker()
    monkeypatch.setattr(harness, "time", made)
    return made
