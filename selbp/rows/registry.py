"""The table of rules: aten operator -> how it runs on k rows.

A rule is a function ``rule(func, *args, **kwargs)`` of the very operator call that autograd made. At least one argument
is a ``RowGradient``. The rule returns what the operator returns, with a ``RowGradient`` for each result that still has
one row per sample. If the call cannot run on k rows, the rule raises ``NoRuleError``; the gradient is then scattered
back to n rows and the operator runs on those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch._ops import OpOverload

Rule = Callable[..., Any]
_R = TypeVar("_R", bound=Rule)


class NoRuleError(Exception):
    """Raised by a rule whose call cannot run on k rows; the message gives the reason."""


class Entry(NamedTuple):
    """A line of the documentation's table."""

    name: str  # aten name with its overload
    family: str  # the file of the rule
    when: str  # the condition under which the rule applies: the first line of its docstring


RULES: dict[OpOverload, Rule] = {}
RULE_OF: dict[int, Rule] = {}  # RULES by id: an operator's own hash is Python code, and dispatch runs between GEMMs
ZERO_RULES: dict[OpOverload, Rule] = {}  # for operators on ``gradient.new_zeros(...)``, see ``gather_scatter``
TABLE: list[Entry] = []


def require(condition: bool, why: str) -> None:
    """Raise NoRuleError with the reason ``why`` unless ``condition`` holds."""
    if not condition:
        raise NoRuleError(why)


def overloads(name: str) -> list[OpOverload]:
    """Return the overload that ``name`` stands for, or an empty list if this torch has none (it then densifies).

    A name without a namespace before it (``"selbp::..."``) is one of ``aten``.
    """
    namespace, _, own = name.rpartition("::")
    base, _, overload = own.partition(".")
    packet = getattr(getattr(torch.ops, namespace or "aten"), base, None)
    operator = getattr(packet, overload or "default", None)
    return [] if operator is None else [operator]


def bind(overload: OpOverload, function: Rule) -> None:
    """Make ``function`` the rule of ``overload``. Operators live as long as torch does, so their ids stay theirs."""
    RULES[overload] = RULE_OF[id(overload)] = function


def rule(*names: str, when: str | None = None) -> Callable[[_R], _R]:
    """Register a function as the rule of the aten operators ``names`` (``"mm"``, ``"sum.dim_IntList"``)."""

    def register(function: _R) -> _R:
        family = function.__module__.rsplit(".", 1)[-1]
        text = when if when is not None else (function.__doc__ or "").strip().splitlines()[0]
        for name in names:
            TABLE.append(Entry(name, family, text))
            for overload in overloads(name):
                bind(overload, function)
        return function

    return register


def zero_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operators ``names`` on a ``Zeros`` as first argument."""

    def register(function: Rule) -> Rule:
        for name in names:
            for overload in overloads(name):
                ZERO_RULES[overload] = function
        return function

    return register
