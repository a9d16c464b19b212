"""One run, in full: everything that its result depends on, checked at construction, and the key it is cached under."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from selbp_study.models import MODELS

LATER = {"precision": "float32"}  # fields that runs of this format may lack, and what those ran with
FORMAT = 2  # part of every key: raise it when the same configuration would give another result


@dataclass(frozen=True)
class RunConfig:
    """A training run. Everything that changes its weights or its timings is here, and nothing else."""

    dataset: str
    fingerprint: str  # of the data's content
    selector: str  # name[:option=value,...]
    steps: int
    lr: float  # peak learning rate
    model: str = "cnn"
    keep: float | int = 0.25  # a share or a number of samples
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1  # share of the steps in which the rate rises to lr; then it falls linearly to 0
    seed: int = 0
    backward: Literal["auto", "rows", "recompute"] = "auto"
    scoring: Literal["same", "eval"] = "same"
    head_gradient: Literal["subset", "full"] = "subset"
    cut: str = ""  # a module's name, or how many layers below the output; "" for none
    options: str = ""  # further arguments of SelectiveBackprop: option=value,...
    evaluate_every: int = 200
    journal_every: int = 1  # steps between saved states: what a kill may lose
    device: str = "cpu"
    threads: int = 0  # 0: as torch decides
    precision: Literal["float32", "bfloat16"] = "float32"  # bfloat16: forward and backward under autocast

    def __post_init__(self) -> None:
        for field in fields(self):  # numbers of NumPy are numbers: kept as Python's, as JSON gives them back
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        for name in ("dataset", "fingerprint", "selector", "model", "cut", "options", "device"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a text, got {getattr(self, name)!r}")
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("evaluate_every", 1),
            ("journal_every", 1),
            ("threads", 0),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("momentum", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("warmup", 0.0, 1.0),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and low <= value < high) or (name == "lr" and value == 0):
                raise ValueError(f"{name} must be a number in [{low}, {high}), above 0 for lr, got {value!r}")
        if self.seed >= 1 << 32:
            raise ValueError(f"seed must lie in [0, 2^32), got {self.seed}")
        if self.model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {self.model!r}")
        for name, choices in (
            ("backward", ("auto", "rows", "recompute")),
            ("scoring", ("same", "eval")),
            ("head_gradient", ("subset", "full")),
            ("precision", ("float32", "bfloat16")),
        ):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self.kept()

    def kept(self) -> int:
        """Samples of each minibatch that run backward."""
        keep = self.keep
        number = isinstance(keep, (int, float)) and not isinstance(keep, bool)
        if not number or not (keep >= 1 if isinstance(keep, int) else 0.0 < keep <= 1.0):
            raise ValueError(f"keep must be a share in (0, 1] (1.0 is all) or a number of samples, got {keep!r}")
        return min(keep, self.batch_size) if isinstance(keep, int) else max(1, round(keep * self.batch_size))

    def rate(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): up in the warm-up, then linearly to 0 after the last step."""
        rise = max(1, round(self.warmup * self.steps))
        return self.lr * min((step + 1) / rise, (self.steps - step) / max(1, self.steps - rise + 1), 1.0)

    def as_dict(self) -> dict[str, Any]:
        """Every field, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of :meth:`as_dict`; unknown or missing fields are a ValueError."""
        names = {field.name for field in fields(cls)}
        values = LATER | values
        if set(values) != names:
            raise ValueError(f"configuration has the fields {sorted(values)}, not {sorted(names)}")
        return cls(**values)

    def key(self) -> str:
        """A digest of all of it: equal keys, equal runs."""
        told = {name: value for name, value in self.as_dict().items() if name not in LATER or value != LATER[name]}
        text = json.dumps([FORMAT, told], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def differences(self, other: RunConfig) -> list[str]:
        """``field: mine, not theirs`` for every field that differs."""
        mine, theirs = self.as_dict(), other.as_dict()
        return [f"{name}: {mine[name]!r}, not {theirs[name]!r}" for name in mine if mine[name] != theirs[name]]
