"""Whether a random program has the gradients that plain torch computes. Run as a script to try seeds by hand:

python tests/fuzz/model_check.py 1234        # one seed: the program, made as short as still fails
python tests/fuzz/model_check.py 0 500       # 500 seeds from 0: those that fail, a line each
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(1, str(Path(__file__).parents[2]))

from model_generator import Program, Store, build, describe, leaves, random_model, run
from model_step import step_gradients, step_selectors

import selbp
from selbp.training.backward.rows.tensor import observers

Total = Callable[[Any, Callable[[Any, Tensor], Any]], Tensor]  # (losses, how rows are chosen) -> a scalar
Between = Callable[[int, Tensor], Tensor]
TOLERANCE, SINGLE = (
    1e-9,
    1e-5,
)  # of the greatest gradient: some 10^6 times the rounding of one operator in float64, 10^2 in float32
SMALL = 1e-4  # losses have gradients of 1 to 2: what is left of them is not expected below 1e-9 of this
NOISE = 1e-13  # of the greatest gradient of a step: far above rounding, see `amplified`


class Wrong(AssertionError):
    """Gradients that differ, or a state that was left behind."""


Gradients = dict[str, Any]  # by name: a tensor, or None


def plain_rows(losses: Any, index: Tensor) -> Any:
    """What ``selbp.select`` stands for."""
    return pytree.tree_map(lambda value: value[index] if isinstance(value, Tensor) else value, losses)


def gradients(
    program: Program, store: Store, total: Total, *, rows: bool, between: Between | None = None, times: int = 1
) -> Gradients:
    """Of every leaf, and what the hooks in the program saw; after ``times`` backwards of one forward."""
    outcome = run(program, store, rows=rows, between=between)
    loss = total(outcome.losses, selbp.select if rows else plain_rows)
    for again in range(times):
        for leaf in leaves(store):
            leaf.grad = None
        for values in outcome.seen.values():
            values.clear()
        loss.backward(retain_graph=again < times - 1)
    found: Gradients = {f"leaf {i} {tuple(leaf.shape)}": leaf.grad for i, leaf in enumerate(leaves(store))}
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


def amplified(program: Program, store: Store, total: Total, between: Between | None, want: Gradients) -> Gradients:
    """How far plain gradients move if every step's gradient is off by NOISE: what rounding could do, and more."""
    source = torch.Generator().manual_seed(0)

    def shake(gradient: Tensor) -> Tensor:
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
    what: str, program: Program, store: Store, total: Total, got: Gradients, between: Between | None = None,
    want: Gradients | None = None,
) -> None:  # fmt: skip
    """Raise unless ``got`` is what plain torch computes, to rounding."""
    want = gradients(program, store, total, rows=False, between=between) if want is None else want
    scale = scale_of(want)
    if scale == float("inf"):
        return  # plain torch itself has NaN or Inf there: nothing to compare with
    limit = (SINGLE if store.single else TOLERANCE) * max(scale, SMALL)
    wrong = [(name, error) for name, error in differences(got, want) if error > limit]
    if wrong:
        moved = dict(differences(amplified(program, store, total, between, want), want))
        wrong = [(name, error) for name, error in wrong if error > 10 * moved.get(name, 0.0)]
    if wrong:
        lines = [f"  {name}: off by {error:.3g}, greatest gradient {scale:.3g}" for name, error in wrong[:6]]
        raise Wrong("\n".join([what, *lines]))


# ------------------------------------------------------------------------------------------------------ what is tried
def index_sets(rng: random.Random, n: int) -> dict[str, list[int]]:
    """Selections of every kind."""
    some = rng.sample(range(n), rng.randint(1, n))
    return {
        "some": some,
        "twice": [*some, rng.choice(some)],
        "one": [rng.randrange(n)],
        "all": rng.sample(range(n), n),
        "none": [],
        "many": [rng.randrange(n) for _ in range(n + 2)],
    }


def weighted(choose: Callable[[Any, Tensor], Any], losses: Any, index: list[int]) -> Tensor:
    """Chosen losses, each with another weight, so that rows mixed up would show."""
    chosen = choose(losses, torch.tensor(index, dtype=torch.int64))
    weights = torch.linspace(1, 2, len(index), dtype=torch.float64)
    parts = [part for part in pytree.tree_leaves(chosen) if isinstance(part, Tensor)]
    return sum((part * weights.view(-1, *[1] * (part.dim() - 1))).sum() for part in parts)  # type: ignore[return-value]


def check_selections(program: Program, store: Store, rng: random.Random) -> None:
    """Two kinds of selections, one of them differentiated twice; and two in one loss."""
    sets = index_sets(rng, program.n)
    for times, name in enumerate(rng.sample(sorted(sets), 2), 1):

        def total(losses: Any, choose: Any, index: list[int] = sets[name]) -> Tensor:
            return weighted(choose, losses, index)

        want = gradients(program, store, total, rows=False)
        state = torch.get_rng_state()
        got = gradients(program, store, total, rows=True, times=times)
        if times == 1 and not torch.equal(state, torch.get_rng_state()):
            raise Wrong("the generator of random numbers is not where plain torch leaves it")
        compare(f"select(losses, {sets[name]}), backward {times} of one forward", program, store, total, got, want=want)
    if rng.random() < 0.4:
        first, second = (sets[name] for name in rng.sample(sorted(sets), 2))

        def several(losses: Any, choose: Any) -> Tensor:
            dense = [part for part in pytree.tree_leaves(losses) if isinstance(part, Tensor)]
            return weighted(choose, losses, first) + 2 * weighted(choose, losses, second) + dense[-1].sum() * 0.3

        got = gradients(program, store, several, rows=True)
        compare(f"two selections, {first} and {second}, and a dense term", program, store, several, got)


def check_cut(program: Program, store: Store, rng: random.Random) -> None:
    """A cut, or two, at the results of steps; plain torch scales and zeros the rows by a hook."""
    places = sorted(rng.sample(range(len(program.steps)), min(len(program.steps), rng.choice([1, 1, 2]))))
    keep = rng.randint(1, program.n)
    selected = rng.sample(range(program.n), rng.randint(1, program.n)) if rng.random() < 0.3 else None
    source = torch.Generator().manual_seed(program.seed)
    cuts = {place: selbp.SelectiveBackward(keep, selbp.Random(), generator=source) for place in places}

    def total(losses: Any, choose: Any) -> Tensor:
        if selected is not None:
            return weighted(choose, losses, selected)
        return sum(part.sum() for part in pytree.tree_leaves(losses) if isinstance(part, Tensor))  # type: ignore[return-value]

    def cut(position: int, x: Tensor) -> Tensor:
        return cuts[position](x) if position in cuts else x

    def by_hand(position: int, x: Tensor) -> Tensor:
        if position not in cuts or cuts[position]._cut.last is None or not x.requires_grad:
            return x
        chosen, n = cuts[position].report.selection, program.n

        def rows(gradient: Tensor) -> Tensor:
            weights = (n * chosen.weights).to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
            return torch.zeros_like(gradient).index_add_(0, chosen.indices, gradient[chosen.indices] * weights)

        x.register_hook(rows)
        return x

    got = gradients(program, store, total, rows=True, between=cut)
    what = f"a cut after step {' and '.join(map(str, places))} that keeps {keep}, losses {selected or 'all'}"
    compare(what, program, store, total, got, by_hand)


def check_step(program: Program, store: Store, rng: random.Random) -> None:
    """``SelectiveBackprop`` with either backward; recomputing needs a forward that treats samples alike and alone."""
    name = rng.choice(sorted(step_selectors()))
    ways = ["rows"] if store.mixes or store.draws else ["rows", "recompute"]
    for backward in ways:
        got, want = step_gradients(program, store, name, backward)
        scale = scale_of(want)
        for entry, error in differences(got, want):
            if error > (SINGLE if store.single else TOLERANCE) * max(scale, SMALL):
                raise Wrong(
                    f"SelectiveBackprop({name}, backward={backward!r})\n  {entry}: off by {error:.3g} of {scale:.3g}"
                )


CHECKS = {"selections": check_selections, "cut": check_cut, "step": check_step}


def check(program: Program) -> None:
    """Raise :class:`Wrong`, or what selbp itself raised, where the program's gradients are not plain torch's."""
    warnings.simplefilter("ignore")
    rng = random.Random(f"check {program.seed}")
    asked = {"selections": True, "cut": rng.random() < 0.6, "step": rng.random() < 0.4}
    for name, function in CHECKS.items():
        if asked[name]:
            store = build(program)
            if name != "step" or (program.n > 1 and program.steps):
                function(program, store, random.Random(f"{name} {program.seed}"))
    if observers or not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        raise Wrong("a mode or an observer is left behind")


def failure(program: Program) -> str | None:
    """What is wrong with the program, in words; None where nothing is."""
    try:
        check(program)
    except Exception as error:  # noqa: BLE001  (whatever it raises is what is reported)
        return f"{type(error).__name__}: {str(error)[:600]}"
    return None


def sound(program: Program) -> bool:
    """Plain torch runs the program."""
    try:
        store = build(program)
        gradients(program, store, lambda losses, choose: weighted(choose, losses, [0]), rows=False)
    except Exception:  # noqa: BLE001
        return False
    return True


def _sort_of(what: str | None) -> str:
    return "" if what is None else what.split("(")[0].split("[")[0][:60]


def shortened(program: Program) -> Program:
    """The program without the steps, and the samples, that a failure of the same sort does not need."""
    smaller, sort = True, _sort_of(failure(program))
    while smaller:
        smaller = False
        candidates = [program.without(i) for i in range(len(program.steps))] if len(program.steps) > 1 else []
        candidates += [replace(program, n=n) for n in range(1, program.n)]
        for candidate in candidates:
            if sound(candidate) and _sort_of(failure(candidate)) == sort:
                program, smaller = candidate, True
                break
    return program


def report(seed: int) -> str | None:
    """A message about a seed that fails: the shortest program, its text, and the command to run it again."""
    if failure(random_model(seed)) is None:
        return None
    program = shortened(random_model(seed))
    what, store = failure(program), build(program)
    return f"{describe(program, store)}\n{what}\n  again: python tests/fuzz/model_check.py {seed}"


def main(first: int, count: int | None) -> int:
    """Try seeds; print each before it runs (a crash is then known by its seed), and those that fail."""
    torch.set_num_threads(1)
    if count is None:
        message = report(first)
        print(message or f"seed {first} is right")
        return int(message is not None)
    failed = 0
    for seed in range(first, first + count):
        print(f"seed {seed}", flush=True)
        what = failure(random_model(seed))
        if what is not None:
            failed += 1
            print(f"FAILED {seed} {what.splitlines()[0]}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
