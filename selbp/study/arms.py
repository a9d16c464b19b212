"""From a rule's name on the command line to the selector."""

from __future__ import annotations

import importlib
from typing import Any

from selbp.selectors import Selector
from selbp.study.rules import RULES, Rule

__all__ = ["RULES", "Rule", "build_selector", "keep_for", "parse"]


def parse(spec: str) -> tuple[Rule, dict[str, Any]]:
    """Split ``name[:option=value,...]`` into the rule and its options. ValueError says what is wrong with it."""
    name, _, rest = spec.partition(":")
    if name not in RULES:
        raise ValueError(f"there is no selector {name!r}; there are {', '.join(RULES)}")
    options = dict(RULES[name].options)
    for part in filter(None, rest.split(",")):
        option, equals, text = part.partition("=")
        if not equals or not option:
            raise ValueError(f"selector options are written name:option=value,..., got {part!r}")
        options[option.strip()] = _value(text.strip())
    return RULES[name], options


def build_selector(spec: str) -> Selector:
    """The selector that ``spec`` describes. ValueError for a name or an option that does not exist."""
    rule, options = parse(spec)
    constructor = getattr(importlib.import_module("selbp.selectors"), rule.selector)
    try:
        return constructor(**options)
    except TypeError as error:
        raise ValueError(f"selector {spec!r}: {error}") from error


def keep_for(spec: str, keep: float | int) -> float | int:
    """``keep``, or 1.0 for the full batch."""
    return 1.0 if spec.partition(":")[0] == "full" else keep


def _value(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
