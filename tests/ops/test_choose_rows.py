"""Choosing rows: the specification against its definitions, and the native kernel against the specification."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selbp import reference
from selbp.ops import choose_rows
from selbp.reference.sampling import (
    inclusion_probabilities,
    sample_rows,
    sample_with_replacement,
    systematic,
    top_rows,
    uniform,
)

F64 = torch.float64


def bisect(odds, k):
    """The same probabilities by bisection on c in ``sum min(1, c odds) = k``."""
    if (odds > 0).sum() <= k:
        return (odds > 0).to(F64)
    low, high = 0.0, k / float(odds[odds > 0].min())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if (middle * odds).clamp(max=1).sum() > k else (middle, high)
    return (low * odds).clamp(max=1)


@pytest.mark.parametrize("k", [1, 3, 10, 39, 40])
@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0, 20.0])
def test_inclusion_probabilities(spread, k):
    odds = torch.randn(40, dtype=F64).mul(spread).exp()
    odds[7] = 0.0
    found = inclusion_probabilities(odds, k)
    torch.testing.assert_close(found, bisect(odds, k), rtol=1e-9, atol=1e-12)
    assert found.sum().item() == pytest.approx(min(k, 39))


@given(st.lists(st.sampled_from([0.0, 1e-300, 1e-30, 0.5, 1.0, 1.0, 3.0, 1e30]), min_size=1, max_size=12), st.data())
@settings(max_examples=300, deadline=None)
def test_inclusion_probabilities_of_whatever_odds(values, data):
    odds = torch.tensor(values, dtype=F64)
    k = data.draw(st.integers(1, len(values)))
    found = inclusion_probabilities(odds, k)
    positive = int((odds > 0).sum())
    assert torch.isfinite(found).all() and ((found >= 0) & (found <= 1)).all()
    assert (found[odds == 0] == 0).all()
    assert found.sum().item() == pytest.approx(min(k, positive))
    indices, real, probability = sample_rows(odds, k, uniform(len(odds) + 1, odds, None))
    assert int(real.sum()) == min(k, positive) and indices[real].unique().numel() == int(real.sum())
    assert (odds[indices[real]] > 0).all() and (probability[real] > 0).all()
    if positive:
        assert (odds[indices] > 0).all()  # spare slots repeat a row that was drawn
    else:
        assert (indices == 0).all()


def test_systematic_draws_each_row_with_its_probability():
    draws = 8000
    probability = inclusion_probabilities(torch.randn(24, dtype=F64).mul(2).exp(), 7)
    assert (probability == 1).any() and (probability < 0.1).any()
    generator = torch.Generator().manual_seed(5)
    hits = torch.stack(
        [systematic(probability, uniform(len(probability) + 1, probability, generator)) for _ in range(draws)]
    )
    assert (hits.sum(1) == 7).all()
    deviation = (probability * (1 - probability) / draws).sqrt()
    z = (hits.double().mean(0) - probability) / deviation.clamp(min=1e-12)
    assert z.abs().max() < 4.5


def test_every_pair_can_be_drawn_together():
    """What the random order is for: in a fixed order neighbours exclude each other."""
    probability = torch.full((8,), 0.5, dtype=F64)
    generator = torch.Generator().manual_seed(1)
    hits = torch.stack(
        [systematic(probability, uniform(len(probability) + 1, probability, generator)) for _ in range(2000)]
    ).double()
    together = hits.T @ hits / 2000
    assert (together > 0.1).all()


def test_replacement_draws_with_the_odds():
    odds = torch.tensor([0.0, 1.0, 3.0, 0.0, 6.0], dtype=F64)
    indices, real, chance = sample_with_replacement(odds, 50_000, torch.Generator().manual_seed(0))
    assert real.all()
    torch.testing.assert_close(chance, odds[indices] / 10)
    share = torch.bincount(indices, minlength=5) / 50_000
    deviation = (odds / 10 * (1 - odds / 10) / 50_000).sqrt()
    assert ((share - odds / 10).abs() <= 4.5 * deviation).all()
    indices, real, _ = sample_with_replacement(torch.zeros(3), 2, None)
    assert indices.tolist() == [0, 0] and not real.any()


def test_top_rows():
    key = torch.tensor([1.0, 5.0, math.nan, 5.0, -math.inf, 0.0])
    eligible = torch.tensor([True, True, False, True, False, True])
    indices, real = top_rows(key, eligible, 3)
    assert indices.tolist() == [1, 3, 0] and real.all()
    indices, real = top_rows(key, eligible, 6)
    assert indices.tolist() == [1, 3, 0, 5, 1, 1] and real.tolist() == [True] * 4 + [False] * 2
    indices, real = top_rows(key, torch.zeros(6, dtype=torch.bool), 2)
    assert indices.tolist() == [0, 0] and not real.any()


# ------------------------------------------------------------------------------------------------- the native kernel

SCORES = {
    "any": lambda x: 5.0 * x,
    "graded": lambda x: (20.0 * x).exp(),
    "ties": lambda x: x.round(),
    "signed zeros": lambda x: (0.3 * x).round(),
    "gaps": lambda x: torch.where(x > 0.5, math.nan, torch.where(x < -1.5, -math.inf, x)),
    "equal": torch.ones_like,
    "zero": torch.zeros_like,
}


def cases():
    generator = torch.Generator().manual_seed(0)
    for seed in range(40):
        n = 1 + seed * 7 % 61 if seed < 39 else 700
        draws = torch.rand(n + 1, dtype=F64, generator=generator)
        valid = torch.rand(n, generator=generator) > (0.0, 0.2, 1.1)[seed % 3 if seed < 38 else 0]
        for make in SCORES.values():
            score = make(torch.randn(n, dtype=F64, generator=generator))
            for k in {1, (n + 2) // 3, n}:
                yield score, valid, draws, k


def differs(kernel):
    """The first case in which the kernel chooses or weights otherwise than specified, or None."""
    for score, valid, draws, k in cases():
        for rule in choose_rows.RULES:
            for weights in choose_rows.WEIGHTS[: 2 if rule == "top" else 3]:
                arguments = (score, valid, None if rule == "top" else draws, k, rule, weights)
                indices, found = kernel(*arguments)
                expected = reference.choose_rows(*arguments)
                if not (torch.equal(indices, expected[0]) and torch.allclose(found, expected[1], rtol=1e-9, atol=0)):
                    return arguments
    return None


def test_the_kernel_is_the_specification():
    assert differs(torch.ops.selbp.choose_rows) is None


MUTANTS = {
    "scores not masked": lambda f: lambda s, v, *a: f(s, torch.ones_like(v), *a),
    "the offset forgotten": lambda f: (
        lambda s, v, d, *a: f(s, v, None if d is None else torch.cat([d[:-1], 0 * d[:1]]), *a)
    ),
    "the order forgotten": lambda f: lambda s, v, d, *a: f(s, v, None if d is None else d[-1:].expand(len(d)), *a),
    "one row fewer": lambda f: (
        lambda s, v, d, k, *a: tuple(torch.cat([x, x[:1] * 0])[:k] for x in f(s, v, d, max(1, k - 1), *a))
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    assert differs(MUTANTS[name](torch.ops.selbp.choose_rows)) is not None


@pytest.mark.parametrize("length", [1, 5, 64, 200])
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
def test_the_percentiles_are_the_specification(make, length):
    for n in (1, 17, 64):
        history, loss = (make(torch.randn(size, dtype=F64)) for size in (length, n))
        for past in (history, torch.full_like(history, math.nan)):
            found, expected = choose_rows.percentile(past, loss), reference.percentile(past, loss)
            assert all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in zip(found, expected, strict=True))


def test_opcheck_without_draws():
    score, valid = torch.randn(9, dtype=F64).exp(), torch.ones(9, dtype=torch.bool)
    torch.library.opcheck(torch.ops.selbp.choose_rows.default, (score[::2], valid[::2], None, 4, "top", "mean"))
