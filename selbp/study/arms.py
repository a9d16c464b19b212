"""The arms of a comparison: the selection rules by the names that the command line and the tables use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

from selbp.selectors import Selector


@dataclass(frozen=True)
class Rule:
    """A selection rule by name. ``lr`` was tuned on held-out training data (see ``selbp compare --tune``)."""

    selector: str  # class in selbp.selectors
    label: str
    summary: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05


RULES: dict[str, Rule] = {
    "full": Rule("Full", "full batch", "every sample: the ordinary step (keep is 1.0)"),
    "random": Rule("Random", "random", "k at random; needs no scoring forward"),
    "top-loss": Rule("TopLoss", "top loss", "the k largest losses"),
    "top-loss-refit": Rule("TopLoss", "top loss, refit", "the same, weights by least squares", {"weights": "refit"}),
    "top-gradnorm": Rule("TopGradNorm", "top gradient norm", "the k largest last-layer gradients"),
    "loss-percentile": Rule("LossPercentile", "loss percentile", "odds by the loss's percentile (Selective-Backprop)"),
    "loss-rank": Rule("LossRank", "loss rank", "odds by the loss's rank in its minibatch"),
    "gradnorm": Rule("GradNormImportance", "gradient-norm importance", "odds by gradient norm, unbiased weights"),
    "matching": Rule("GradientMatching", "gradient matching", "weights and rows that match the mean gradient"),
    "divbs": Rule("DivBS", "diverse (DivBS)", "odds by what the chosen ones do not yet span"),
}


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
