"""Observers belong to the selections that are made inside their block, whichever thread runs the backward."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import selbp
from selbp.rows.observe import Observer, current_observers, observing


class Names(Observer):
    """Collects the operators that ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def ran(self, func: Any, args: Any, result: Any, reason: str | None) -> None:
        self.seen.append(str(func))


def selection() -> Tensor:
    weight = torch.ones(3, requires_grad=True)
    losses = (torch.ones(4, 3) * weight).sum(1)
    return selbp.select(losses, torch.tensor([0, 2])).sum()


def cut() -> Tensor:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), selbp.BackwardCut(0.5, selbp.Random()), nn.Linear(3, 1))
    return model(torch.ones(4, 3)).sum()


def in_a_thread(function: Callable[[], Any]) -> Any:
    """In a thread with a context of its own, which a Python without the GIL does not give by itself."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(contextvars.Context().run(function)))
    thread.start()
    thread.join()
    return results[0]


MADE = {"select": selection, "cut": cut}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_the_backward_may_run_after_the_block_and_in_another_thread(make: Callable[[], Tensor]) -> None:
    names = Names()
    with observing(names):
        total = make()
    assert not names.seen
    in_a_thread(total.backward)
    assert names.seen and names not in current_observers()


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_no_other_selection_is_heard(make: Callable[[], Tensor]) -> None:
    names = Names()
    before = make()
    with observing(names):
        elsewhere = in_a_thread(make)
        before.backward()
    make().backward()
    elsewhere.backward()
    assert not names.seen


def test_blocks_nest_and_an_error_ends_them() -> None:
    outer, inner = Names(), Names()
    with observing(outer):
        with pytest.raises(RuntimeError, match="stop"), observing(inner):
            assert current_observers()[-2:] == (outer, inner)
            selection().backward()
            raise RuntimeError("stop")
        count = len(inner.seen)
        assert current_observers()[-1:] == (outer,)
        selection().backward()
    assert count == len(inner.seen) and len(outer.seen) == 2 * count > 0


def test_a_recomputation_is_announced() -> None:
    class Recomputed(Observer):
        def __init__(self) -> None:
            self.events: list[object] = []

        def recompute_begins(self, n: int, k: int) -> None:
            self.events.append((n, k))

        def recompute_ends(self) -> None:
            self.events.append("end")

    recomputed = Recomputed()
    with observing(recomputed):
        losses = selbp.checkpoint(nn.Linear(3, 3), torch.ones(4, 3, requires_grad=True)).sum(1)
        total = selbp.select(losses, torch.tensor([0, 2])).sum()
    assert not recomputed.events
    total.backward()
    assert recomputed.events == [(4, 2), "end"]
