"""Many tiny operators: a second thread would only wait for the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from selbp.rows.gradient import FAILED
from selbp.rows.observe import Observer, observing


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_rule_fails() -> Iterator[None]:
    """An operator whose rule raises runs on n rows instead, which would hide a fault of the rule."""
    failures: list[str] = []

    class Failures(Observer):
        def ran(self, func: Any, args: Any, result: Any, reason: str | None) -> None:
            if reason is not None and reason.startswith(FAILED):
                failures.append(f"{func}: {reason}")

    with observing(Failures()):
        yield
    assert not failures
