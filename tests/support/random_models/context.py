"""What a step of a random program may ask for: choices, parameters, shapes, earlier values. And the table of steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

F64 = torch.float64
LARGEST = 64  # elements of one sample, between steps


class Operator(NamedTuple):
    """One line of the table: a function of (context, x), and the kind of tensor that it takes."""

    run: Callable[[Context, Tensor], Tensor]
    kind: str  # "any", "vector" (n, d), "sequence" (n, T, d), "image" (n, C, H, W) or "volume" (n, C, D, H, W)
    mixes: bool  # a sample's result depends on other samples, or on where the sample stands in the minibatch
    draws: bool  # random: a forward on fewer samples draws something else
    weight: int  # how often it is drawn, next to others


OPERATORS: dict[str, Operator] = {}


def step(kind: str, **options: Any) -> Callable[[Any], Any]:
    """Register a function of (context, x) under its own name; ``options`` are those of :func:`add`."""

    def register(function: Any) -> Any:
        add(function.__name__, function, kind, **options)
        return function

    return register


def add(name: str, function: Any, kind: str, *, mixes: bool = False, draws: bool = False, weight: int = 4) -> None:
    """Register ``function`` as the step ``name``. A step that makes choices of its own weighs more than a table's."""
    assert name not in OPERATORS, name
    OPERATORS[name] = Operator(function, kind, mixes, draws, weight)


def table(kind: str, functions: dict[str, Callable[[Tensor], Tensor]], *, mixes: bool = False) -> None:
    """Register functions of the tensor alone."""
    for name, function in functions.items():
        add(name, lambda c, x, function=function: function(x), kind, mixes=mixes, weight=1)


@dataclass
class Store:
    """What stays from run to run of a program: parameters, modules, constants."""

    kept: dict[Any, Any] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)
    text: list[str] = field(default_factory=list)  # one line a step, of the last run
    mixes: bool = False
    draws: bool = False
    single: bool = False  # a part of it runs in single precision

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """The thing of that name, made in the first run."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Context:
    """Handed to every step of one run. What it gives depends on the step's own seed only."""

    def __init__(self, store: Store, n: int, rows: bool) -> None:
        self.store, self.n, self.rows = store, n, rows
        self.saved: list[Tensor] = []  # results of earlier steps
        self.seen: dict[Any, list[Tensor]] = {}  # what hooks were given, by step
        self.retained: dict[Any, Tensor] = {}  # hidden tensors that keep their gradient
        self.key: Any = None

    def enter(self, key: Any) -> None:
        """Begin the step ``key``."""
        self.key, self.rng, self.notes, self._made = key, random.Random(str(key)), [], 0

    def pick(self, name: str, choices: Any) -> Any:
        """One of ``choices``; the text of the program shows it."""
        value = self.rng.choice(list(choices))
        self.notes.append(f"{name}={getattr(value, '__name__', value)}")
        return value

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.rng.random() < p

    def _next(self) -> Any:
        self._made += 1
        return (self.key, self._made)

    def generator(self) -> torch.Generator:
        """A source of numbers that gives the same in every run."""
        return torch.Generator().manual_seed(self.rng.getrandbits(40))

    def const(self, *shape: int) -> Tensor:
        """A normal tensor without a gradient. One with the samples' dim makes the program depend on positions."""
        source = self.generator()
        return self.store.keep(self._next(), lambda: torch.randn(shape, dtype=F64, generator=source))

    def per_sample(self, *shape: int) -> Tensor:
        """A normal tensor (n, ...) without a gradient."""
        self.store.mixes = True
        return self.const(self.n, *shape)

    def ints(self, high: int, *shape: int) -> Tensor:
        """Integers below ``high``, as :meth:`const`."""
        source = self.generator()
        return self.store.keep(self._next(), lambda: torch.randint(high, shape, generator=source))

    def param(self, *shape: int, dtype: torch.dtype = F64) -> Tensor:
        """A parameter; now and then one that the program has already (tied), or a frozen one."""
        source, tie, freeze, hooked = self.generator(), self.chance(0.15), self.chance(0.1), self.chance(0.1)
        scale = 1.0 / max(1, shape[-1] if shape else 1) ** 0.5

        def make() -> nn.Parameter:
            if tie:
                for other in self.store.parameters:
                    if other.shape == shape and other.dtype == dtype:
                        return other
            made = nn.Parameter(torch.randn(shape, dtype=dtype, generator=source) * scale, not freeze)
            if hooked and not freeze:
                made.register_hook(lambda gradient: gradient * 0.5)
            self.store.parameters.append(made)
            return made

        return self.store.keep(self._next(), make)

    def trainable(self, size: int) -> nn.Parameter:
        """A parameter (size,) that is never frozen, for a program that would have no gradient otherwise."""
        made: nn.Parameter = self.store.keep("trainable", lambda: nn.Parameter(torch.ones(size, dtype=F64)))
        if not any(made is other for other in self.store.parameters):
            self.store.parameters.append(made)
        return made

    def module(self, make: Callable[[], nn.Module], dtype: torch.dtype = F64) -> Any:
        """A module whose parameters are of normal size."""
        source, freeze = self.generator(), self.chance(0.1)

        def build() -> nn.Module:
            made = make().to(dtype)
            for parameter in made.parameters():
                scale = 1.0 / max(1, parameter.shape[-1] if parameter.dim() > 1 else 2) ** 0.5
                noise = torch.randn(parameter.shape, dtype=parameter.dtype, generator=source)
                parameter.data.copy_(noise * scale + (parameter.dim() == 1) * 0.5)
                parameter.requires_grad_(not freeze)
                self.store.parameters.append(parameter)
            return made

        return self.store.keep(self._next(), build)

    def earlier(self, x: Tensor) -> Tensor:
        """The result of an earlier step, or of this one's predecessor, brought to the shape of ``x``."""
        position = self.rng.randrange(len(self.saved))
        self.notes.append(f"of={position}")
        return self.fit(self.saved[position], *x.shape[1:])

    def fit(self, x: Tensor, *shape: int) -> Tensor:
        """``x`` (n, ...) as (n, *shape): cut short, or repeated, where sizes differ."""
        want = torch.Size(shape).numel()
        if tuple(x.shape[1:]) == shape:
            return x
        flat = x.reshape(self.n, x.numel() // self.n)
        have = flat.shape[1]
        if have > want:
            flat = flat[:, :want] if self.chance(0.5) else flat.narrow(1, have - want, want)
        elif have < want:
            times = -(-want // have)
            flat = flat.repeat(1, times) if self.chance(0.5) else torch.cat([flat] * times, 1)
            flat = flat[:, :want]
        return flat.reshape(self.n, *shape) if self.chance(0.5) else flat.contiguous().view(self.n, *shape)

    def shaped(self, x: Tensor, kind: str) -> Tensor:
        """``x`` as the kind of tensor that an operator takes."""
        pick = self.rng.choice
        if kind == "vector":
            return x if x.dim() == 2 and x.shape[1] % 4 == 0 else self.fit(x, pick([4, 8, 12]))
        if kind == "sequence":
            fits = x.dim() == 3 and x.shape[2] % 4 == 0
            return x if fits else self.fit(x, pick([2, 3, 4]), pick([4, 8]))
        if kind == "image":
            fits = x.dim() == 4 and x.shape[1] % 4 == 0 and min(x.shape[2:]) > 2
            return x if fits else self.fit(x, 4, pick([3, 4]), pick([3, 4]))
        if kind == "volume":
            return self.fit(x, 2, 2, pick([3, 4]), 4)
        assert kind == "any", kind
        return x
