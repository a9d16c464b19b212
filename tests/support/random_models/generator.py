"""Random differentiable programs over n samples: ``random_model(seed)``, and how one is run.

A program is a list of named steps, each with a seed of its own. A step takes a tensor of any shape, makes of it what it
needs, and draws its choices from its seed: so a step may be left out and the rest still runs, which is how a failing
program is made shorter.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from support.random_models import losses as model_losses
from support.random_models import (  # noqa: F401  (each module registers its steps)
    ops_autograd,
    ops_backwards,
    ops_batch,
    ops_complex,
    ops_layers,
    ops_pointwise,
    ops_rare,
    ops_sequence,
    ops_shapes,
)
from support.random_models.context import F64, LARGEST, OPERATORS, Context, Store

SHAPES = [(8,), (12,), (3, 8), (2, 4), (4, 3, 3), (4, 4, 4)]
NAMES = {mixes: [name for name in OPERATORS if mixes or not OPERATORS[name].mixes] for mixes in (False, True)}
WEIGHTS = {mixes: [OPERATORS[name].weight for name in NAMES[mixes]] for mixes in (False, True)}


class Step(NamedTuple):
    """An operator, and what its choices are drawn from."""

    name: str
    seed: str


@dataclass(frozen=True)
class Program:
    """A random model: its steps, its samples, and the selections that it is tried with."""

    seed: int
    n: int
    shape: tuple[int, ...]  # of one sample
    steps: tuple[Step, ...]
    input_grad: bool  # the input requires grad too

    def without(self, position: int) -> Program:
        """The program that lacks one step."""
        return replace(self, steps=self.steps[:position] + self.steps[position + 1 :])


def random_model(seed: int) -> Program:
    """The program of that seed: 1 to 8 steps on 1 to 6 samples."""
    rng = random.Random(f"model {seed}")
    n = rng.choice([1, 2, 3, 4, 4, 5, 5, 6])
    mixes = rng.random() < 0.4
    names = rng.choices(NAMES[mixes], WEIGHTS[mixes], k=rng.choice([1, 2, 3, 4, 5, 6, 8]))
    steps = tuple(Step(name, f"{seed}/{i}") for i, name in enumerate(names))
    return Program(seed, n, rng.choice(SHAPES), steps, rng.random() < 0.5)


def describe(program: Program, store: Store) -> str:
    """The program as text, a line a step, with what each drew and the shape it returned."""
    head = f"seed {program.seed}: n={program.n}, input {(program.n, *program.shape)}"
    return "\n".join([head + (", requires grad" if program.input_grad else ""), *store.text])


class Outcome(NamedTuple):
    """One forward of a program."""

    losses: Any
    last: Tensor  # the value that the losses were computed from
    seen: dict[Any, list[Tensor]]  # what hooks saw of gradients, once the backward has run
    retained: dict[Any, Tensor]  # hidden tensors whose gradients are kept


def build(program: Program) -> Store:
    """Parameters and constants of a program, made in a first run of it."""
    store = Store()
    run(program, store, rows=False)
    return store


def leaves(store: Store) -> list[Tensor]:
    """What gradients are compared of: the input, and every parameter."""
    found = {id(p): p for p in [store.kept["input"], *store.parameters] if p.requires_grad}
    return list(found.values())


def run(
    program: Program,
    store: Store,
    *,
    rows: bool,
    x: Tensor | None = None,
    between: Callable[[int, Tensor], Tensor] | None = None,
    finish: bool = True,
) -> Outcome:
    """One forward. ``rows``: by selbp's own functions where a step has one. ``between`` is given each step's result."""
    torch.manual_seed(program.seed % 2**31)
    if x is None:
        x = store.keep("input", lambda: _input(program))
    c = Context(store, len(x), rows)
    c.saved, text = [x], []
    for position, (name, seed) in enumerate(program.steps):
        operator = OPERATORS[name]
        c.enter(seed)
        store.mixes |= operator.mixes
        store.draws |= operator.draws
        x = _tame(c, operator.run(c, c.shaped(x, operator.kind)), seed)
        text.append(f"  {position}. {name}({', '.join(c.notes)}) -> {tuple(x.shape)}")
        if between is not None:
            x = between(position, x)
        c.saved.append(x)
    if not x.requires_grad:
        c.enter("gradient")
        x = x * c.trainable(x.shape[-1])
    c.enter(f"loss {program.seed}")
    losses = model_losses.losses(c, x) if finish else None
    store.text = [*text, f"  losses({', '.join(c.notes)})"]
    return Outcome(losses, x, c.seen, c.retained)


def _input(program: Program) -> Tensor:
    source = torch.Generator().manual_seed(program.seed)
    made = torch.randn(program.n, *program.shape, dtype=F64, generator=source)
    if program.seed % 4 == 0:  # with the samples last in memory
        made = made.movedim(0, -1).contiguous().movedim(-1, 0)
    return nn.Parameter(made) if program.input_grad else made


def _tame(c: Context, x: Tensor, seed: str) -> Tensor:
    """Of moderate size: neither many elements nor large ones, so that rounding stays where it was."""
    if x.dim() < 2:
        x = x.reshape(c.n, 1)
    if x.numel() > LARGEST * c.n:
        x = x.flatten(1)[:, : LARGEST // 2]
    scale = c.store.keep((seed, "scale"), lambda: min(1.0, 3.0 / max(1e-9, float(x.detach().abs().max()))))
    return x if scale == 1.0 else x * scale
