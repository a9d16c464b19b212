"""Arms: a rule with its options and, where they are its own, the training options it runs with."""

from __future__ import annotations

import difflib
import importlib
import inspect
from dataclasses import dataclass, fields, replace
from typing import Any

from selbp.selectors import Selector
from selbp_study.config import RunConfig
from selbp_study.rules import ARMS, RULES, Rule

__all__ = ["ARMS", "RULES", "Arm", "Rule", "build_selector", "keep_for", "options_of", "parse"]

Value = bool | int | float | str


def parse(spec: str) -> tuple[Rule, dict[str, Any]]:
    """Split ``name[:option=value,...]`` into the rule and its options. ValueError says what is wrong with it."""
    name, _, rest = spec.partition(":")
    if name in ARMS:
        raise ValueError(f"the arm {name!r} takes no options: write it out, {ARMS[name][1]}")
    if name not in RULES:
        near = difflib.get_close_matches(name, [*RULES, *ARMS], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        hint = " (in a list, write ; between a rule's options)" if "=" in name else hint
        raise ValueError(
            f"there is no selector {name!r}{hint}; there are {', '.join(RULES)} and the arms {', '.join(ARMS)}"
        )
    return RULES[name], {**RULES[name].options, **options_of(rest)}


def options_of(text: str) -> dict[str, Value]:
    """``option=value,...`` as a dict; values become bools and numbers where they look like some."""
    options: dict[str, Value] = {}
    for part in filter(None, text.split(",")):
        option, equals, value = part.partition("=")
        if not equals or not option:
            raise ValueError(f"selector options are written name:option=value,..., got {part!r}")
        options[option.strip()] = _value(value.strip())
    return options


def build_selector(spec: str) -> Selector:
    """The selector that ``spec`` describes. ValueError for a name or an option that does not exist."""
    rule, options = parse(spec)
    module, _, name = rule.selector.rpartition(":")
    constructor = getattr(importlib.import_module(module or "selbp.selectors"), name)
    known = list(inspect.signature(constructor).parameters)
    unknown = [option for option in options if option not in known]
    if unknown:
        has = f"its options are {', '.join(known)}" if known else "it has none"
        raise ValueError(f"selector {spec!r} has no option {unknown[0]!r}: {has}")
    try:
        return constructor(**options)
    except TypeError as error:
        raise ValueError(f"selector {spec!r}: {error}") from error


def keep_for(spec: str, keep: float | int) -> float | int:
    """``keep``, or 1.0 for the full batch."""
    return 1.0 if spec.partition(":")[0] == "full" else keep


@dataclass(frozen=True)
class Arm:
    """One line of a table: a selector and the training options that are its own; None takes what all arms share.

    Written ``rule[:option=value,...][@option=value,...]``: the rule's options after the colon, the arm's after the
    ``@``. Of the latter, those that are not fields here are handed to :class:`selbp.SelectiveBackprop` as they are.
    """

    selector: str  # rule[:option=value,...]
    lr: float | None = None  # None: the rule's own
    keep: float | int | None = None
    cut: str | None = None  # a module's name, or how many linear or convolutional layers the cut is below the output
    head_gradient: str | None = None
    backward: str | None = None
    scoring: str | None = None
    batch_size: int | None = None
    precision: str | None = None
    share: float | None = None  # of the budget that the other arms have
    options: str = ""  # further arguments of SelectiveBackprop: option=value,...
    title: str | None = None

    @classmethod
    def parse(cls, text: str) -> Arm:
        """The arm that ``text`` describes, or names (:data:`ARMS`). ValueError says what is wrong with it."""
        title = None
        if text in ARMS:
            title, text = ARMS[text]
        selector, _, rest = text.partition("@")
        rule, _ = parse(selector)
        given = {**options_of(rule.training), **options_of(rest)}
        known = {field.name for field in fields(cls)} - {"selector", "options"}
        own: dict[str, Any] = {name: value for name, value in given.items() if name in known}
        if "cut" in own:
            own["cut"] = str(own["cut"])
        for name, kinds in (("lr", (int, float)), ("batch_size", (int,)), ("share", (int, float))):
            if name in own and (isinstance(own[name], bool) or not isinstance(own[name], kinds)):
                raise ValueError(f"arm {text!r}: {name} must be a number, got {own[name]!r}")
        if not 0 < own.get("share", 1) <= 1:
            raise ValueError(f"arm {text!r}: share must be in (0, 1], got {own['share']!r}")
        if rule.sampling and (given.get("sampling") != rule.sampling or given.get("proxy") is False):
            raise ValueError(
                f"{text!r} lacks what the rule reads, which sampling={rule.sampling} and its proxy give it: take the "
                f"arm {rule.arm}, or write {selector}@keep=32,sampling={rule.sampling},pool=128"
            )
        further = ",".join(f"{name}={value}" for name, value in given.items() if name not in known)
        return cls(selector, **{"title": title, **own}, options=further)

    @property
    def name(self) -> str:
        """The arm as the text that :meth:`parse` reads, without rate and title. No two arms have the same."""
        own = [f"{name}={getattr(self, name)}" for name in OWN if getattr(self, name) is not None]
        return "@".join(filter(None, (self.selector, ",".join([*own, *filter(None, [self.options])]))))

    @property
    def label(self) -> str:
        """Its title, or the rule's label with the options that were given."""
        if self.title is not None:
            return self.title
        rule, _ = parse(self.selector)
        options = ", ".join(filter(None, (self.selector.partition(":")[2], self.name.partition("@")[2])))
        return f"{rule.label} ({options})" if options else rule.label

    def rate(self) -> float:
        """Its learning rate."""
        return parse(self.selector)[0].lr if self.lr is None else self.lr

    def config(self, base: RunConfig, seed: int) -> RunConfig:
        """``base`` with what is this arm's own."""
        keep = keep_for(self.selector, base.keep) if self.keep is None else self.keep
        if "sampling" not in options_of(self.options):  # with it, the keep is how many samples are drawn
            keep = keep_for(self.selector, keep)
        own = {name: getattr(self, name) for name in OWN[1:-1] if getattr(self, name) is not None}
        return replace(base, selector=self.selector, keep=keep, lr=self.rate(), seed=seed, options=self.options, **own)


OWN = ("keep", "cut", "head_gradient", "backward", "scoring", "batch_size", "precision", "share")


def _value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
