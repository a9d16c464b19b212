"""Draws: native equals specified, odds are what they say, weights are unbiased, and planted biases are caught."""

import dataclasses

import pytest
import torch
from support.sampling_kit import known_table

from selbp.sampling import draw as module
from selbp.sampling.draw import Odds, draw, odds_of, specified, uniform

LIMIT = 4.5  # of a z-score: 40 of them pass with probability > 0.999 for any seed
DRAWS = 4000


def splitmix(seed, step, stream, ident):
    """The generator in Python's own integers."""
    golden, bits = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mixed(x):
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & bits
        x = (x ^ x >> 27) * 0x94D049BB133111EB & bits
        return x ^ x >> 31

    origin = mixed((mixed((mixed((seed + golden) & bits) + step + golden) & bits) + stream + golden) & bits)
    return ((mixed((origin + (ident + 1) * golden) & bits) >> 12) + 0.5) / 2**52


@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 1])
def test_numbers_are_those_of_splitmix(seed):
    ids = torch.tensor([0, 1, 12345, 1 << 40, -1])
    want = [splitmix(seed, 3, 1, ident) for ident in ids.tolist()]
    assert uniform(seed, 3, 1, ids).tolist() == want
    assert all(0 < x < 1 for x in want)


def test_numbers_are_uniform_and_streams_differ():
    ids = torch.arange(20_000)
    first, second = uniform(1, 0, 0, ids), uniform(1, 0, 1, ids)
    for x in (first, second):
        error = (12 * len(x)) ** -0.5
        assert abs(float(x.mean()) - 0.5) < LIMIT * error
        assert float((x.sort().values - (ids + 0.5) / len(ids)).abs().max()) < 2.2 / len(ids) ** 0.5  # Kolmogorov
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < LIMIT / len(ids) ** 0.5


TABLES = {
    "known": lambda: known_table(300),
    "part unknown": lambda: partly_known(),
    "all unknown": lambda: known_table(300).__class__(300, 4),
    "learned": lambda: learned(),
}


def partly_known():
    table = known_table(300)
    table.forget(torch.arange(0, 300, 3))
    return table


def learned():
    table = known_table(300)
    table.probability.fill_(1.0)
    return table


@pytest.mark.parametrize("unbiased", [False, True], ids=["gumbel", "unbiased"])
@pytest.mark.parametrize(("pool", "k", "rows"), [(300, 48, 3), (100, 100, 0), (7, 1, 0), (7, 1, 1), (64, 63, 20)])
@pytest.mark.parametrize("kind", TABLES)
def test_native_is_the_specification(kind, pool, k, rows, unbiased):
    table = TABLES[kind]()
    ids = torch.randperm(300)[:pool]
    factor = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    for step, power, floor, balance in (
        (0, 0.5, 0.1, None),
        (1, 1.0, 0.0, None),
        (2, 0.7, 1.0, factor),
        (3, 0.0, 0.1, factor),
    ):
        arguments = (table._columns, ids, k, rows, Odds(power, floor), balance, 5, step, unbiased)
        (got, weights), (want, wanted) = draw(*arguments), specified(*arguments)
        assert got.tolist() == want.tolist()
        assert len(set(got.tolist())) == k
        assert (weights is None) == (wanted is None) == (not unbiased)
        if unbiased:
            torch.testing.assert_close(weights, wanted, rtol=1e-9, atol=0)  # sums of up to 300 in another order


def test_a_draw_follows_from_seed_step_and_ids():
    table, ids = known_table(100), torch.arange(100)
    one = draw(table._columns, ids, 10, 2, Odds(), None, 1, 1)[0]
    torch.randn(3)
    assert torch.equal(one, draw(table._columns, ids, 10, 2, Odds(), None, 1, 1)[0])
    order = torch.randperm(100)
    assert sorted(order[draw(table._columns, order, 10, 2, Odds(), None, 1, 1)[0]].tolist()) == sorted(one.tolist())
    assert not torch.equal(one, draw(table._columns, ids, 10, 2, Odds(), None, 2, 1)[0])
    assert not torch.equal(one, draw(table._columns, ids, 10, 2, Odds(), None, 1, 2)[0])


def z_of_shares(counts, expected, draws):
    return ((counts / draws - expected) / (expected * (1 - expected) / draws).sqrt()).abs().max()


@pytest.mark.parametrize("mutant", [None, "power", "floor", "responsibility"], ids=str)
def test_one_row_is_drawn_in_proportion_to_its_odds(mutant, monkeypatch):
    table, ids, odds = known_table(20), torch.arange(20), Odds(0.5, 0.1)
    share = odds_of(table._columns, ids, odds, None)
    r, p = table.responsibility.double(), table.probability.double()
    value = r * (1 - p).sqrt()
    torch.testing.assert_close(share, value + 0.1 * value.mean(), rtol=1e-12, atol=0)
    if mutant == "responsibility":
        table.responsibility.fill_(1.0)
    elif mutant:
        odds = dataclasses.replace(odds, **{mutant: 1.5})
    drawn = torch.cat([draw(table._columns, ids, 1, 0, odds, None, 3, step)[0] for step in range(DRAWS)])
    z = z_of_shares(torch.bincount(drawn, minlength=20), share / share.sum(), DRAWS)
    assert (z > LIMIT) == (mutant is not None)


def test_the_second_row_is_drawn_in_proportion_among_the_rest():
    table, ids = known_table(5, seed=2), torch.arange(5)
    share = odds_of(table._columns, ids, Odds(), None)
    share = share / share.sum()
    pairs = torch.stack([draw(table._columns, ids, 2, 0, Odds(), None, 4, step)[0] for step in range(DRAWS)])
    counts = torch.bincount(pairs[:, 0] * 5 + pairs[:, 1], minlength=25).view(5, 5)
    want = share[:, None] * share / (1 - share)[:, None]
    off = ~torch.eye(5, dtype=torch.bool)
    assert z_of_shares(counts[off], want[off], DRAWS) < LIMIT


def test_uniform_rows_come_first_and_disregard_the_odds():
    table, ids = known_table(20), torch.arange(20)
    rows = torch.stack([draw(table._columns, ids, 6, 2, Odds(), None, 5, step)[0][:2] for step in range(DRAWS)])
    counts = torch.bincount(rows.flatten(), minlength=20)
    assert z_of_shares(counts, torch.full((20,), 0.1, dtype=torch.float64), DRAWS) < LIMIT


def estimates(rows, weights, gradients):
    return (weights[:, :, None] * gradients[rows]).sum(1)


@pytest.mark.parametrize("uniform_rows", [0, 1, 3, 6])
@pytest.mark.parametrize("mutant", [False, True], ids=["weights", "mean"])
def test_unbiased_weights_estimate_the_pools_mean(uniform_rows, mutant):
    table, ids = known_table(16, seed=1), torch.randperm(16)
    gradients = torch.randn(16, 8, dtype=torch.float64)
    gradients[:, 0] = table.score[ids]  # what a bias towards high scores shows in
    drawn = [draw(table._columns, ids, 6, uniform_rows, Odds(), None, 6, step, True) for step in range(DRAWS)]
    rows, weights = (torch.stack(part) for part in zip(*drawn, strict=True))
    if mutant:
        weights = torch.full_like(weights, 1 / 6)
    found = estimates(rows, weights, gradients)
    z = ((found.mean(0) - gradients.mean(0)) / (found.std(0) / DRAWS**0.5).clamp(min=1e-12)).abs().max()
    assert (z > LIMIT) == (mutant and uniform_rows < 6)


def test_the_specification_reads_nothing_back(monkeypatch):
    def refuse(*_):
        raise AssertionError("a value was read back")

    table = known_table(50)
    monkeypatch.setattr(module, "choose", lambda *a: (torch.arange(a[3]), torch.ones(a[3], dtype=torch.float64)))
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for unbiased in (False, True):
        specified(table._columns, torch.arange(50), 10, 2, Odds(), None, 0, 0, unbiased)


def test_native_reads_samples_with_strides():
    table, ids = known_table(60), torch.arange(60)
    factor = torch.tensor([1.0, 7.0, 0.5, 7.0, 2.0, 7.0, 1.0, 7.0], dtype=torch.float64)
    for unbiased in (False, True):
        found = [
            draw(table._columns, some, 6, 2, Odds(), weight, 3, 5, unbiased)
            for some, weight in (
                (ids[::2], factor[::2]),
                (ids[::2].contiguous(), factor[::2].contiguous()),
            )
        ]
        assert torch.equal(found[0][0], found[1][0])
        assert not unbiased or torch.equal(found[0][1], found[1][1])
