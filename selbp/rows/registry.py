"""The table of rules: aten operator -> how it runs on k rows.

A rule is a function ``rule(func, *args, **kwargs)`` of the very operator call that autograd made, at least one argument
of which is a ``RowGradient``. It returns what the operator returns, with a ``RowGradient`` where the result still has
one row per sample, or raises ``NoRuleError``: then the gradient is scattered back to n rows and the operator runs so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch._ops import OpOverload

Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)


class NoRuleError(Exception):
    """Raised by a rule whose call cannot run on k rows; the message says why."""


class Entry(NamedTuple):
    """A line of the documentation's table."""

    name: str  # aten name with its overload
    family: str  # the file of the rule
    when: str  # first line of the rule's docstring: the condition under which it applies


RULES: dict[OpOverload, Rule] = {}
RULE_OF: dict[int, Rule] = {}  # the same by id: an operator's own hash is Python code, and this runs between two GEMMs
TABLE: list[Entry] = []


def need(condition: bool, why: str) -> None:
    """Leave the rule unless ``condition`` holds."""
    if not condition:
        raise NoRuleError(why)


def overloads(name: str) -> list[OpOverload]:
    """The overloads that ``name`` stands for; none where this torch does not have it (it then merely densifies)."""
    base, _, overload = name.partition(".")
    packet = getattr(torch.ops.aten, base, None)
    found = getattr(packet, overload or "default", None)
    return [] if found is None else [found]


def put(overload: OpOverload, function: Rule) -> None:
    """Make ``function`` the rule of ``overload`` (operators live as long as torch does, so that ids stay theirs)."""
    RULES[overload] = RULE_OF[id(overload)] = function


def rule(*names: str, when: str | None = None) -> Callable[[_R], _R]:
    """Register a function as the rule of the aten operators ``names`` (``"mm"``, ``"sum.dim_IntList"``)."""

    def register(function: _R) -> _R:
        family = function.__module__.rsplit(".", 1)[-1]
        text = when if when is not None else (function.__doc__ or "").strip().splitlines()[0]
        for name in names:
            TABLE.append(Entry(name, family, text))
            for overload in overloads(name):
                put(overload, function)
        return function

    return register
