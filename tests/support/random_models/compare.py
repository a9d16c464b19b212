"""The gradients of a program with and without selbp, and whether they differ by more than rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import selbp
from support.random_models.context import Store
from support.random_models.generator import Outcome, Program, leaves, run

Total = Callable[[Outcome, Callable[[Any, Tensor], Any]], Tensor]  # (a forward, how rows are chosen) -> a scalar
Between = Callable[[int, Tensor], Tensor]
# Of the greatest gradient: some 10^6 times the rounding of an operator in float64, some 10^3 times in float32. Losses
# have gradients of 1 to 2, of which operators may leave next to nothing: hence the least that counts as greatest.
DOUBLE, SINGLE = (1e-9, 1e-4), (1e-4, 1e-1)
NOISE = 1e-13  # of the greatest gradient of a step: far above rounding, see `amplified`


class Wrong(AssertionError):
    """Gradients that differ, or a state that was left behind."""


Gradients = dict[str, Any]  # by name: a tensor, or None


def plain_rows(losses: Any, index: Tensor) -> Any:
    """What ``selbp.select`` stands for."""
    return pytree.tree_map(lambda value: value[index] if isinstance(value, Tensor) else value, losses)


def gradients(
    program: Program,
    store: Store,
    total: Total,
    *,
    rows: bool,
    between: Between | None = None,
    times: int = 1,
    add_up: bool = False,
) -> Gradients:
    """Of every leaf, and what the hooks in the program saw; after ``times`` backwards of one forward."""
    outcome = run(program, store, rows=rows, between=between)
    loss = total(outcome, selbp.select if rows else plain_rows)
    for again in range(times):
        for leaf in [*leaves(store), *outcome.retained.values()]:
            leaf.grad = leaf.grad if add_up and again else None
        for values in outcome.seen.values():
            values.clear()
        torch.manual_seed(program.seed % 2**31)  # for backwards that draw
        loss.backward(retain_graph=again < times - 1)
    found: Gradients = {f"leaf {i} {tuple(leaf.shape)}": leaf.grad for i, leaf in enumerate(leaves(store))}
    for key, hidden in outcome.retained.items():
        found[f"retained by step {key}"] = None if hidden.grad is None else hidden.grad + 0
    for key, values in outcome.seen.items():
        found.update({f"hook of step {key}, call {i}": value for i, value in enumerate(values)})
    return found


def differences(got: Gradients, want: Gradients) -> Iterator[tuple[str, float]]:
    """Entries that are not alike: by how much, infinitely where they are not comparable."""
    for name in sorted(got.keys() | want.keys()):
        a, b = got.get(name), want.get(name)
        if a is None and b is None:
            continue
        alike = a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype
        if not alike or (name.startswith("leaf") and type(a) is not Tensor):
            yield f"{name}: {_kind(a)} where {_kind(b)} was expected", float("inf")
        elif a.numel():
            yield name, _greatest(torch.as_tensor(a - b))


def _kind(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"


def _greatest(value: Tensor) -> float:
    worst = float(value.detach().abs().max()) if value.numel() else 0.0
    return worst if worst == worst else float("inf")


def scale_of(found: Gradients) -> float:
    """The greatest entry of any of these gradients."""
    return max((_greatest(value) for value in found.values() if value is not None), default=0.0)


def limit_of(store: Store, scale: float) -> float:
    """The error that rounding may cause where the greatest gradient is ``scale``."""
    share, least = SINGLE if store.single else DOUBLE
    return share * max(scale, least)


def amplified(program: Program, store: Store, total: Total, between: Between | None, want: Gradients) -> Gradients:
    """How far plain gradients move if every step's gradient is off by NOISE: what rounding could do, and more."""
    source = torch.Generator().manual_seed(0)

    def shake(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # the step's only reader has none for it
            return None
        size = NOISE * gradient.abs().max() if gradient.numel() else 0.0
        noise = torch.randn(gradient.shape, dtype=torch.float64, generator=source)
        return gradient + size * noise * (gradient != 0)

    def noisy(position: int, x: Tensor) -> Tensor:
        x = x if between is None else between(position, x)
        if x.requires_grad:
            x = x * 1
            x.register_hook(shake)
        return x

    return gradients(program, store, total, rows=False, between=noisy)


def compare(
    what: str,
    program: Program,
    store: Store,
    total: Total,
    got: Gradients,
    between: Between | None = None,
    want: Gradients | None = None,
) -> None:
    """Raise unless ``got`` is what plain torch computes, to rounding."""
    want = gradients(program, store, total, rows=False, between=between) if want is None else want
    scale = scale_of(want)
    if scale == float("inf"):
        return  # plain torch itself has NaN or Inf there: nothing to compare with
    limit = limit_of(store, scale)
    wrong = [(name, error) for name, error in differences(got, want) if error > limit]
    if wrong:
        moved = dict(differences(amplified(program, store, total, between, want), want))
        wrong = [(name, error) for name, error in wrong if error > 10 * moved.get(name, 0.0)]
    if wrong:
        lines = [f"  {name}: off by {error:.3g}, greatest gradient {scale:.3g}" for name, error in wrong[:6]]
        raise Wrong("\n".join([what, *lines]))
