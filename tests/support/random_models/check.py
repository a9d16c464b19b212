"""Whether a random program has the gradients that plain torch computes. Run as a script to try seeds by hand:

python tests/support/random_models/check.py 1234     # one seed: the program, made as short as still fails
python tests/support/random_models/check.py 0 500    # 500 seeds from 0: those that fail, a line each
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if __name__ == "__main__":
    sys.path[:1] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[3])]

import selbp
from selbp.rows.observe import current_observers
from support.random_models.compare import Wrong, compare, differences, gradients, limit_of, scale_of
from support.random_models.generator import Outcome, Program, Store, build, describe, random_model
from support.random_models.step import RULES, only_rows, step_gradients


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
    part = rng.choice(["losses", "losses", "last"])  # of the losses, or of the value below them
    add_up = rng.random() < 0.5
    for times, name in enumerate(rng.sample(sorted(sets), 2), 1):

        def total(outcome: Outcome, choose: Any, index: list[int] = sets[name]) -> Tensor:
            return weighted(choose, getattr(outcome, part), index)

        again = times if add_up else 1
        want = gradients(program, store, total, rows=False, times=again, add_up=True)
        state = torch.get_rng_state()
        got = gradients(program, store, total, rows=True, times=times, add_up=add_up)
        if times == 1 and not torch.equal(state, torch.get_rng_state()):
            raise Wrong("the generator of random numbers is not where plain torch leaves it")
        what = f"select({part}, {sets[name]}), backward {times} of one forward{', added up' * add_up}"
        compare(what, program, store, total, got, want=want)
    if rng.random() < 0.4:
        first, second = (sets[name] for name in rng.sample(sorted(sets), 2))

        def several(outcome: Outcome, choose: Any) -> Tensor:
            dense = [value for value in pytree.tree_leaves(outcome.losses) if isinstance(value, Tensor)]
            chosen = weighted(choose, outcome.losses, first) + 2 * weighted(choose, getattr(outcome, part), second)
            return chosen + dense[-1].sum() * 0.3

        got = gradients(program, store, several, rows=True)
        compare(f"selections {first} and {second}, and a dense term", program, store, several, got)


def check_cut(program: Program, store: Store, rng: random.Random) -> None:
    """A cut, or two, at the results of steps; plain torch scales and zeros the rows by a hook."""
    places = sorted(rng.sample(range(len(program.steps)), min(len(program.steps), rng.choice([1, 1, 2]))))
    keep = rng.randint(1, program.n)
    selected = rng.sample(range(program.n), rng.randint(1, program.n)) if rng.random() < 0.3 else None
    source = torch.Generator().manual_seed(program.seed)
    rule = rng.choice([selbp.Random, selbp.Random, selbp.TopGradNorm, selbp.GradientMatching, selbp.GradNormImportance])
    cuts = {place: selbp.BackwardCut(keep, rule(), generator=source) for place in places}

    def total(outcome: Outcome, choose: Any) -> Tensor:
        if selected is not None:
            return weighted(choose, outcome.losses, selected)
        return sum(part.sum() for part in pytree.tree_leaves(outcome.losses) if isinstance(part, Tensor))  # type: ignore[return-value]

    def cut(position: int, x: Tensor) -> Tensor:
        return cuts[position](x) if position in cuts else x

    def by_hand(position: int, x: Tensor) -> Tensor:
        if position not in cuts or cuts[position]._cut.last is None or not x.requires_grad:
            return x
        x.register_hook(only_rows(cuts[position].report.selection, program.n))
        return x

    got = gradients(program, store, total, rows=True, between=cut)
    where = " and ".join(map(str, places))
    what = f"a cut after step {where} that keeps {keep} ({rule.__name__}), losses {selected or 'all'}"
    compare(what, program, store, total, got, by_hand)


def check_step(program: Program, store: Store, rng: random.Random) -> None:
    """``SelectiveBackprop`` with either backward; recomputing needs a forward that treats samples alike and alone."""
    rule, cut = rng.choice(sorted(RULES)), rng.random() < 0.4
    for backward in ["rows"] if store.mixes or store.draws else ["rows", "recompute"]:
        got, want = step_gradients(program, store, "Random" if cut else rule, backward, cut)
        scale = scale_of(want)
        for entry, error in differences(got, want):
            if error > limit_of(store, scale) and scale < float("inf"):
                what = f"SelectiveBackprop({rule}, backward={backward!r}{', cut' * cut})"
                raise Wrong(f"{what}\n  {entry}: off by {error:.3g} of {scale:.3g}")


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
    if current_observers() or not torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
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
        gradients(program, store, lambda outcome, choose: weighted(choose, outcome.losses, [0]), rows=False)
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
    return f"{describe(program, store)}\n{what}\n  again: python tests/support/random_models/check.py {seed}"


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
