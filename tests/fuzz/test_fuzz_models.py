"""Random models: the gradients of chosen rows, of cuts and of steps are those of plain torch.

A failing seed prints its program, made as short as still fails; ``python tests/support/random_models/check.py SEED``
runs it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.random_models.check import failure, report
from support.random_models.context import OPERATORS
from support.random_models.generator import build, describe, random_model
from support.random_models.kept import KEPT
from torch import Tensor

from selbp.rows import RowGradient, registry
from selbp.rows.layout import Slices
from selbp.rows.registry import RULES, bind

FAST, CHUNKS = 300, 10
SLOW, SLOW_CHUNK = 10_000, 500
SCRIPT = Path(__file__).parents[1] / "support" / "random_models" / "check.py"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chunks(seeds: int, size: int) -> dict[str, range]:
    """Seeds in portions, by a name for each."""
    return {f"seeds_{first}": range(first, min(first + size, seeds)) for first in range(0, seeds, size)}


FAST_CHUNKS = chunks(FAST, FAST // CHUNKS)
SLOW_CHUNKS = chunks(SLOW, SLOW_CHUNK)


@pytest.mark.parametrize("seeds", FAST_CHUNKS.values(), ids=FAST_CHUNKS)
def test_random_models_have_the_gradients_of_plain_torch(seeds: range) -> None:
    wrong = [message for seed in seeds if (message := report(seed)) is not None]
    assert not wrong, "\n\n" + "\n\n".join(wrong)


@pytest.mark.parametrize("name", KEPT)
def test_models_that_failed_once(name: str) -> None:
    program = KEPT[name]
    what = failure(program)
    assert what is None, f"\n{describe(program, build(program))}\n{what}"


def attempt(first: int, count: int) -> tuple[list[str], int | None]:
    """Seeds in a process of their own: what failed, and the seed at which the process ended early."""
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), str(first), str(count)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    if done.returncode in (0, 1) and f"seed {first + count - 1}" in lines:
        return failed, None
    started = [line for line in lines if line.startswith("seed ")]
    last = int(started[-1].split()[1]) if started else first + count - 1  # it did not even start
    return [*failed, f"CRASHED {last} (status {done.returncode}) {done.stderr[-300:]}"], last


@pytest.mark.slow
@pytest.mark.parametrize("seeds", SLOW_CHUNKS.values(), ids=SLOW_CHUNKS)
def test_ten_thousand_random_models(seeds: range) -> None:
    wrong, first = [], seeds.start
    while first < seeds.stop:
        failed, crashed = attempt(first, seeds.stop - first)
        wrong += failed
        first = seeds.stop if crashed is None else crashed + 1
    assert not wrong, "\n" + "\n".join(wrong) + f"\none of them again: python {SCRIPT} SEED"


def test_the_programs_are_many_and_various() -> None:
    programs = [random_model(seed) for seed in range(FAST)]
    used = {step.name for program in programs for step in program.steps}
    assert len(OPERATORS) >= 300
    assert len(used) >= 250
    assert {program.n for program in programs} >= {1, 2, 6}


# ------------------------------------------------------------------------------- planted bugs that the fuzz must find
def _scaled(name: str) -> None:
    """The rule's results are off by a thousandth."""
    for overload in registry.overloads(name):
        right = RULES[overload]

        def wrong(*args: object, right: object = right, **kwargs: object) -> object:
            out = right(*args, **kwargs)  # type: ignore[operator]
            if isinstance(out, Tensor):
                return out * 1.001
            return tuple(part * 1.001 if isinstance(part, Tensor) else part for part in out)

        bind(overload, wrong)


def _without_conjugation(monkeypatch: pytest.MonkeyPatch) -> None:
    for overload in registry.overloads("_conj"):
        bind(overload, lambda func, gradient: gradient.clone())


def _other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Slices.take

    def take(self: Slices, tensor: Tensor, layout: object, dim: int) -> Tensor:
        return right(self, tensor, layout, dim).roll(1, dim)  # type: ignore[arg-type]

    monkeypatch.setattr(Slices, "take", take)


def _dense_rows_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RowGradient.to_dense

    def to_dense(self: RowGradient, *args: object, **kwargs: object) -> Tensor:
        return right(self, *args, **kwargs).roll(1, self._layout.dim)

    monkeypatch.setattr(RowGradient, "to_dense", to_dense)


# By what the bug is, and a word in the names of the steps that could meet it.
MUTANTS = {
    "mul": ("mul.Tensor", ""),
    "mm": ("mm", ""),
    "bmm": ("bmm", ""),
    "sum": ("sum.dim_IntList", ""),
    "cumsum": ("cumsum", "cum"),
    "convolution": ("convolution_backward", "conv"),
    "layer_norm": ("native_layer_norm_backward", "norm"),
    "embedding": ("embedding_dense_backward", "embedding"),
    "slice": ("slice_backward", ""),
    "gather": ("gather", ""),
    "index_put": ("index_put", "embedding"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
    "pooling": ("max_pool2d_with_indices_backward", "pool"),
    "no_conjugation": (_without_conjugation, "complex"),
    "other_rows": (_other_rows, ""),
    "dense_rows_elsewhere": (_dense_rows_elsewhere, ""),
}


@pytest.fixture
def _rules_restored() -> Iterator[None]:
    before = dict(RULES)
    yield
    for overload, function in before.items():
        bind(overload, function)


@pytest.mark.usefixtures("_rules_restored")
@pytest.mark.parametrize("name", MUTANTS)
def test_the_fuzz_finds_a_planted_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant, word = MUTANTS[name]
    programs = [random_model(seed) for seed in range(4 * FAST if word else FAST)]  # whatever the seeds come to draw
    programs = [program for program in programs if any(word in step.name for step in program.steps)]
    mutant(monkeypatch) if callable(mutant) else _scaled(mutant)
    assert any(failure(program) is not None for program in programs)


def test_a_program_is_the_same_each_time() -> None:
    for seed in (3, 4, 5):
        texts = [describe(random_model(seed), build(random_model(seed))) for _ in range(2)]
        assert texts[0] == texts[1]
