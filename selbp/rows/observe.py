"""Observers of a backward through rows: ``diagnose`` and tests listen through them.

A selection (``RowSet``) takes over the observers of the ``observing`` blocks in which it is made, and keeps them. They
belong to that selection's backward, whichever thread of autograd's engine runs it. Selections of other threads, and
those made after the block, have none of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_CURRENT: ContextVar[tuple[Observer, ...]] = ContextVar("selbp_observers", default=())


class Observer:
    """Base class: override the methods that you need."""

    def ran(self, func: Any, args: Any, result: Any, reason: str | None) -> None:
        """Operator ``func`` ran on k rows if ``reason`` is None, else on n rows for that reason."""

    def recompute_begins(self, n: int, k: int) -> None:
        """A checkpoint starts to recompute k of n rows: until it ends, operators meet plain tensors of k rows."""

    def recompute_ends(self) -> None:
        """The recomputation that began last has ended."""


def current_observers() -> tuple[Observer, ...]:
    """The observers of the enclosing ``observing`` blocks, outermost first."""
    return _CURRENT.get()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Give ``observer`` to every selection that this thread makes inside the block."""
    token = _CURRENT.set((*_CURRENT.get(), observer))
    try:
        yield
    finally:
        _CURRENT.reset(token)
