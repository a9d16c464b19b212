"""``selbp.ops.match`` on problems without a clean answer: duplicates, zeros, all scales, bad numbers."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.matching_cases import F32, F64, FLOOR, RULES, check, problem, rows

from selbp import ops
from selbp.ops import MatchStatus


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_duplicates_are_never_chosen_twice(ridge, rule, dtype):
    """Chosen again and again under a ridge elsewhere: 15 distinct rows of 32, residual .636 for .029."""
    g = rows(16, 40, dtype=dtype).repeat(3, 1)
    arguments = problem(g)
    found = ops.match(*arguments, 32, rule=rule, ridge=ridge)
    check(found, *arguments, 32)
    distinct = ops.match(*problem(g[:16]), 16, rule=rule, ridge=ridge)
    assert found.residual <= distinct.residual + (0.05 if ridge else FLOOR[dtype])
    if ridge == 0.0:
        assert (found.indices[: found.count] % 16).unique().numel() == found.count  # a copy adds nothing


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_all_rows_equal(ridge, dtype):
    arguments = problem(torch.ones(8, 3, dtype=dtype))
    found = ops.match(*arguments, 4, ridge=ridge)
    check(found, *arguments, 4)
    assert found.indices[0] == 0 and found.residual <= 1e-3 + FLOOR[dtype]
    if ridge == 0.0:
        assert found.count == 1 and found.status == MatchStatus.OPTIMAL


@pytest.mark.parametrize("dtype", [F64, F32])
def test_near_parallel_rows(dtype):
    base = rows(1, 30)
    g = (base + 1e-6 * rows(20, 30, seed=3)).to(dtype)
    for ridge in (0.0, 1e-3):
        arguments = problem(g)
        found = ops.match(*arguments, 10, ridge=ridge)
        check(found, *arguments, 10)
        assert found.residual <= 2e-3


@pytest.mark.parametrize("dtype", [F64, F32])
def test_nothing_to_match(dtype):
    zero = torch.zeros(5, 5, dtype=dtype)
    found = ops.match(zero, zero[0], zero[0, 0], 3)
    check(found, zero, zero[0], zero[0, 0], 3)
    assert found.count == 0 and found.residual == 0 and found.status == MatchStatus.OPTIMAL
    g = torch.tensor([[1.0, 2.0], [-1.0, -2.0]], dtype=dtype)  # the mean cancels exactly
    found = ops.match(*problem(g), 2)
    assert found.count == 0 and found.residual == 0


def test_only_opposed_rows():
    g = rows(6, 4)
    gram, inner, target_sq = problem(g, -g.mean(0))
    away = inner > 0
    gram[away], gram[:, away], inner[away] = 0.0, 0.0, 0.0
    found = ops.match(gram, inner, target_sq, 4)
    assert found.count == 0 and found.status == MatchStatus.OPTIMAL and found.residual == 1.0
    assert ops.match(gram, inner, target_sq, 4, nonnegative=False).count > 0


@pytest.mark.parametrize("dtype", [F64, F32])
def test_mean_that_nearly_cancels(dtype):
    half = rows(10, 20, shift=0.0)
    g = torch.cat([half, -half + 1e-4 * rows(10, 20, seed=9)])
    arguments = problem(g.to(dtype))
    for ridge in (0.0, 1e-3):
        check(ops.match(*arguments, 8, ridge=ridge), *arguments, 8)


@pytest.mark.parametrize("dtype", [F64, F32])
def test_zero_rows_are_not_chosen(dtype):
    g = rows(12, 6, dtype=dtype)
    g[::2] = 0.0
    arguments = problem(g)
    for rule in RULES:
        found = ops.match(*arguments, 12, rule=rule)
        check(found, *arguments, 12)
        assert (found.indices[: found.count] % 2 == 1).all() and found.count > 0


@pytest.mark.parametrize("n", [1, 2])
def test_smallest(n):
    arguments = problem(rows(n, 3))
    for k in range(4):
        found = ops.match(*arguments, k, ridge=0.0)
        check(found, *arguments, k)
        assert found.count == min(k, n)
    one = ops.match(*arguments, 0)
    assert one.status == MatchStatus.FULL and one.residual == 1.0 and one.indices.shape == (0,)


def test_no_rows():
    found = ops.match(torch.zeros(0, 0), torch.zeros(0), torch.tensor(1.0), 2)
    assert found.count == 0 and found.indices.tolist() == [-1, -1] and found.residual == 1.0
    assert ops.match(torch.zeros(0, 3, 3), torch.zeros(0, 3), torch.zeros(0), 2).indices.shape == (0, 2)


def test_more_slots_than_rows_and_than_rank():
    arguments = problem(rows(10, 3))
    full = ops.match(*arguments, 10, ridge=0.0)
    found = ops.match(*arguments, 25, ridge=0.0)
    check(found, *arguments, 25)
    assert found.count == full.count <= 3 and torch.equal(found.indices[:10], full.indices)


@pytest.mark.parametrize("exponent", [-100, -33, -1, 1, 20, 66, 100])
def test_a_power_of_two_changes_nothing(exponent):
    """Bit for bit, weights aside: scaling rows by s and the target by t scales weights by t / s."""
    gram, inner, target_sq = problem(rows(30, 12))
    base = ops.match(gram, inner, target_sq, 10)
    s, t = 2.0**exponent, 2.0**-3
    found = ops.match(gram * s * s, inner * s * t, target_sq * t * t, 10)
    assert torch.equal(found.indices, base.indices) and torch.equal(found.residual, base.residual)
    assert torch.equal(found.weights, base.weights * (t / s))


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e20, 1e30])
def test_any_scale(scale):
    g = rows(30, 12) * scale
    found, base = ops.match(*problem(g), 10), ops.match(*problem(g / scale), 10)
    assert torch.equal(found.indices, base.indices)
    torch.testing.assert_close(found.weights, base.weights, rtol=1e-9, atol=0.0)
    small = (rows(30, 12) * min(max(scale, 1e-15), 1e15)).float()  # squares that float32 holds
    assert ops.match(*problem(small), 10).indices[:5].tolist() == base.indices[:5].tolist()


@pytest.mark.parametrize("dtype", [F64, F32])
def test_norms_graded_over_twenty_decades(dtype):
    g = (rows(24, 30) * torch.logspace(-14, 6, 24, dtype=F64)[:, None]).to(dtype)
    for rule, ridge in itertools.product(RULES, (0.0, 1e-3)):
        arguments = problem(g)
        found = ops.match(*arguments, 24, rule=rule, ridge=ridge)
        check(found, *arguments, 24)
        assert found.count > 0 and found.residual < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["gram", "inner", "target_sq"])
def test_a_bad_problem_leaves_its_neighbours_alone(where, bad):
    gram, inner, target_sq = problem(torch.stack([rows(12, 8, seed=seed) for seed in range(3)]))
    clean = ops.match(gram, inner, target_sq, 5)
    broken = {"gram": gram.clone(), "inner": inner.clone(), "target_sq": target_sq.clone()}
    broken[where][1] = bad
    found = ops.match(*broken.values(), 5)
    assert found.status[1] == MatchStatus.INVALID and found.count[1] == 0 and found.residual[1].isnan()
    assert (found.indices[1] == -1).all() and (found.weights[1] == 0).all()
    for field, same in zip(found, clean, strict=True):
        assert torch.equal(field[[0, 2]], same[[0, 2]])


def test_rows_that_are_not_valid_are_not_read():
    g = rows(20, 9)
    valid = torch.arange(20) % 3 != 0
    keep = valid.nonzero()[:, 0]
    target = g[keep].sum(0) / 20
    gram, inner, target_sq = problem(g, target)
    alone = ops.match(gram[keep][:, keep], inner[keep], target_sq, 7)
    gram[~valid], gram[:, ~valid], inner[~valid] = torch.nan, torch.inf, torch.nan
    found = ops.match(gram, inner, target_sq, 7, valid=valid)
    assert torch.equal(found.indices, keep[alone.indices])
    torch.testing.assert_close(found.weights, alone.weights, rtol=1e-10, atol=0.0)
    none = ops.match(gram, inner, target_sq, 7, valid=torch.zeros(20, dtype=torch.bool))
    assert none.count == 0 and none.status == MatchStatus.OPTIMAL and none.residual == 1.0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(1, 9).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=n, max_size=n)
    ),
    st.integers(0, 11),
    st.sampled_from(RULES),
    st.sampled_from([0.0, 1e-3, 1.0]),
    st.booleans(),
    st.sampled_from([F64, F32]),
)
def test_whatever_the_rows(entries, k, rule, ridge, nonnegative, dtype):
    """Small integers: full of zero rows, duplicates, opposites and exact ties."""
    arguments = problem(torch.tensor(entries, dtype=dtype))
    found = ops.match(*arguments, k, rule=rule, ridge=ridge, nonnegative=nonnegative)
    check(found, *arguments, k, nonnegative)
    assert found.status in (MatchStatus.FULL, MatchStatus.OPTIMAL)
    assert found.residual <= 1.0 + 1e-6
