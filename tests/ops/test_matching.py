"""What every backend of ``selbp.ops.match`` must do, checked against scipy and a greedy search by exhaustion."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selbp import ops, reference
from selbp.ops import MatchStatus

F64, F32 = torch.float64, torch.float32
RULES = ("ols", "normalized", "raw")
# Relative to 1: float32 cannot certify a residual below 3e-4, the square root of what a rounded Gram leaves.
FLOOR = {F64: 1e-7, F32: 3e-4}


def rows(n, p, *, seed=0, shift=0.3, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, p, generator=generator, dtype=F64) + shift
    return (g * torch.rand(n, 1, generator=generator, dtype=F64).exp()).to(dtype)


def problem(g, target=None):
    """Gram, inner products and target's squared norm of explicit rows (..., n, p), formed in float64."""
    exact = g.double()
    target = exact.mean(-2) if target is None else target.double()
    inner = (exact @ target[..., None])[..., 0]
    return (exact @ exact.mT).to(g.dtype), inner.to(g.dtype), target.square().sum(-1).to(g.dtype)


def ridged(gram, ridge, valid=None):
    valid = torch.ones(len(gram), dtype=torch.bool) if valid is None else valid
    lam = ridge * gram.diagonal()[valid].mean() if valid.any() else 0.0
    return gram + lam * torch.eye(len(gram), dtype=gram.dtype)


def check(found, gram, inner, target_sq, k, nonnegative=True):
    """What holds for whatever one problem: a feasible selection and an honest residual."""
    n = len(inner)
    count = int(found.count)
    assert found.indices.dtype == torch.int64 and found.count.dtype == torch.int32 and found.status.dtype == torch.uint8
    assert found.indices.shape == found.weights.shape == (k,) and 0 <= count <= min(k, n)
    chosen, w = found.indices[:count], found.weights[:count]
    assert (found.indices[count:] == -1).all() and (found.weights[count:] == 0).all()
    assert chosen.unique().numel() == count and ((chosen >= 0) & (chosen < n)).all()
    assert torch.isfinite(found.weights).all()
    if nonnegative:
        assert (w > 0).all()
    if int(found.status) == MatchStatus.FULL:
        assert count == k
    if torch.isfinite(found.residual) and target_sq > 0:
        b, t, w = inner.double()[chosen], target_sq.double(), w.double()
        # Rounding is relative to the terms, which may cancel to much less than they are.
        scale = w.abs() @ gram.double()[chosen][:, chosen].abs() @ w.abs() + 2 * w.abs() @ b.abs() + t
        square = t - 2 * w @ b + w @ gram.double()[chosen][:, chosen] @ w
        slack = 1e-13 if found.weights.dtype == F64 else 1e-7  # of the weights' and the residual's rounding
        assert abs(float(found.residual.double() ** 2 - square.clamp(min=0) / t)) <= 4 * slack * float(scale / t)


def greedy(gram, inner, k, rule, ridge, nonnegative=True):
    """The rule by exhaustion: every candidate's objective from a least-squares solve, weights from scipy."""
    full = ridged(gram, ridge).numpy()
    b = inner.numpy()
    root = np.linalg.cholesky(full).T  # |root w - rhs|^2 = w G w - 2 b w + const
    rhs = np.linalg.solve(root.T, b)
    support, w = [], np.zeros(0)
    removals = 0
    while len(support) < k:
        c = b - gram.numpy()[:, support] @ w
        scores = {}
        for j in set(range(len(b))) - set(support):
            if c[j] <= 1e-10 and nonnegative:
                continue
            if rule == "ols":
                trial = [*support, j]
                scores[j] = b[trial] @ np.linalg.solve(full[np.ix_(trial, trial)], b[trial])
            else:
                scores[j] = abs(c[j]) / (np.sqrt(full[j, j]) if rule == "normalized" else 1.0)
        if not scores:
            break
        support.append(max(scores, key=scores.get))
        if nonnegative:
            w = scipy.optimize.nnls(root[:, support], rhs)[0]
        else:
            w = np.linalg.solve(full[np.ix_(support, support)], b[support])
        removals += int((w == 0).sum())
        support, w = [j for j, x in zip(support, w, strict=True) if x != 0], w[w != 0]
    return support, w, removals


# ------------------------------------------------------------------------------------------- the rule itself


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_equals_greedy_by_exhaustion(rule, nonnegative, ridge):
    removals = 0
    for seed in range(12):
        gram, inner, target_sq = problem(rows(14, 9, seed=seed, shift=0.1))
        found = ops.match(gram, inner, target_sq, 8, rule=rule, ridge=ridge, nonnegative=nonnegative)
        support, w, removed = greedy(gram, inner, 8, rule, ridge, nonnegative)
        removals += removed
        check(found, gram, inner, target_sq, 8, nonnegative)
        assert found.indices[: found.count].tolist() == support
        np.testing.assert_allclose(found.weights[: found.count].numpy(), w, rtol=1e-7)
    if nonnegative and rule == "ols" and ridge == 1e-3:
        assert removals > 0, "no weight turned negative: the removals went untested"


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rule", RULES)
def test_weights_are_optimal_on_the_support(rule, dtype):
    gram, inner, target_sq = problem(rows(60, 25, dtype=dtype))
    for k in (1, 5, 20, 60):
        found = ops.match(gram, inner, target_sq, k, rule=rule)
        check(found, gram, inner, target_sq, k)
        s, w = found.indices[: found.count], found.weights[: found.count].double()
        gradient = ridged(gram.double(), 1e-3)[s][:, s] @ w - inner.double()[s]
        assert gradient.abs().max() <= (1e-12 if dtype == F64 else 1e-5) * gram.abs().max() * w.abs().max().clamp(min=1)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", [(12, 30), (20, 5), (15, 15)])
def test_all_rows_is_nonnegative_least_squares(shape, seed):
    """Also at rank 5 of 20: a row that was dependent on the support must be looked at again after removals."""
    g = rows(*shape, seed=seed, shift=0.0)
    target = torch.randn(shape[1], dtype=F64, generator=torch.Generator().manual_seed(100 + seed))
    gram, inner, target_sq = problem(g, target)
    found = ops.match(gram, inner, target_sq, shape[0], ridge=0.0)
    check(found, gram, inner, target_sq, shape[0])
    _, best = scipy.optimize.nnls(g.T.numpy(), target.numpy())
    assert float(found.residual * target_sq.sqrt()) == pytest.approx(best, rel=1e-7, abs=1e-7)


def test_all_rows_with_signs_is_ridge_regression():
    gram, inner, target_sq = problem(rows(20, 30))
    found = ops.match(gram, inner, target_sq, 20, nonnegative=False)
    exact = torch.linalg.solve(ridged(gram, 1e-3), inner)
    assert found.status == MatchStatus.FULL
    torch.testing.assert_close(found.weights, exact[found.indices], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("rule", RULES)
def test_as_good_as_the_reference(rule, dtype):
    """A backend may break near-ties otherwise; what it reaches must be as good, and monotone in k."""
    for n, p in ((33, 16), (96, 40), (128, 200)):
        arguments = problem(rows(n, p, seed=n, dtype=dtype))
        last = 1.0
        for k in (1, n // 8, n // 4, n // 2):
            found = ops.match(*arguments, k, rule=rule)
            spec = reference.match(*(x.double() for x in arguments), k, rule=rule)
            check(found, *arguments, k)
            assert found.residual <= spec.residual * (1 + 1e-3) + FLOOR[dtype]
            assert found.residual <= last * (1 + 1e-3) + FLOOR[dtype]
            last = float(found.residual)


def test_ties_go_to_the_lowest_index():
    gram, inner = torch.eye(6, dtype=F64), torch.full((6,), 1 / 6, dtype=F64)
    for rule in RULES:
        found = ops.match(gram, inner, inner.new_tensor(1 / 6), 4, rule=rule)
        assert found.indices.tolist() == [0, 1, 2, 3]


def test_tolerance_stops_early():
    gram, inner, target_sq = problem(rows(50, 20))
    found = ops.match(gram, inner, target_sq, 50, tolerance=0.3)
    assert found.status == MatchStatus.TOLERANCE and found.count < 20 and found.residual <= 0.3
    before = ops.match(gram, inner, target_sq, int(found.count) - 1, tolerance=0.3)
    assert before.status == MatchStatus.FULL  # and not one row too many


# ------------------------------------------------------------------------------------------------ degenerate


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


# -------------------------------------------------------------------------------------- tensors and dispatch


def test_batch_dimensions_and_layout():
    gram, inner, target_sq = problem(rows(2 * 3 * 10, 7).reshape(2, 3, 10, 7))
    found = ops.match(gram, inner, target_sq, 4)
    assert found.indices.shape == found.weights.shape == (2, 3, 4)
    assert found.count.shape == found.residual.shape == found.status.shape == (2, 3)
    valid = torch.rand(2, 3, 10, generator=torch.Generator().manual_seed(0)) > 0.3
    masked = ops.match(gram, inner, target_sq, 4, valid=valid)
    for i, j in itertools.product(range(2), range(3)):
        one = ops.match(gram[i, j], inner[i, j], target_sq[i, j], 4)
        assert all(torch.equal(a[i, j], b) for a, b in zip(found, one, strict=True))
        one = ops.match(gram[i, j], inner[i, j], target_sq[i, j], 4, valid=valid[i, j])
        assert all(torch.equal(a[i, j], b) for a, b in zip(masked, one, strict=True))
    spread = torch.zeros(2, 3, 10, 20, dtype=F64)[..., 1::2]  # strided, and not aligned
    spread.copy_(gram)
    strided = ops.match(spread.mT, inner.mT.contiguous().mT, target_sq.T.contiguous().T, 4)
    assert torch.equal(strided.indices, found.indices)
    torch.testing.assert_close(strided.weights, found.weights, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    gram, inner, target_sq = (x.to(dtype) for x in problem(rows(20, 8)))
    found = ops.match(gram, inner, target_sq, 6)
    output = F64 if dtype == F64 else F32
    assert found.weights.dtype == found.residual.dtype == output
    check(found, gram, inner, target_sq, 6)
    assert torch.equal(ops.match(gram, inner, target_sq.double(), 6).indices, found.indices)


def test_operator_contract():
    gram, inner, target_sq = problem(rows(8, 5, dtype=F32))
    arguments = (gram, inner, target_sq, 3, "ols", 1e-3, True, torch.ones(8, dtype=torch.bool), 0.0)
    torch.library.opcheck(torch.ops.selbp.match.default, arguments)
    grad = ops.match(gram.requires_grad_(), inner.requires_grad_(), target_sq, 3)
    assert not grad.weights.requires_grad and not grad.residual.requires_grad


def test_compiles_whole():
    arguments = problem(rows(8, 5, dtype=F32))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def weights_at(gram, inner, target_sq):
        found = ops.match(gram, inner, target_sq, 3, valid=inner > 0)
        return found.indices, found.weights * 2.0

    indices, doubled = weights_at(*arguments)
    found = ops.match(*arguments, 3, valid=arguments[1] > 0)
    assert torch.equal(indices, found.indices) and torch.equal(doubled, found.weights * 2.0)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"gram": torch.zeros(3, 4)}, ValueError, "gram must be"),
        ({"gram": torch.zeros(3)}, ValueError, "gram must be"),
        ({"gram": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "gram must be"),
        ({"inner": torch.zeros(4)}, ValueError, "inner must be"),
        ({"inner": torch.zeros(3, dtype=F64)}, TypeError, "inner must have the dtype"),
        ({"target_sq": torch.zeros(1)}, ValueError, "target_sq must be"),
        ({"k": -1}, ValueError, "k must be"),
        ({"k": 1.0}, TypeError, "k must be"),
        ({"k": True}, TypeError, "k must be"),
        ({"rule": "omp"}, ValueError, "rule must be"),
        ({"ridge": -1e-3}, ValueError, "ridge must be"),
        ({"ridge": float("nan")}, ValueError, "ridge must be"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be"),
        ({"valid": torch.ones(3)}, TypeError, "valid must be"),
        ({"valid": torch.ones(4, dtype=torch.bool)}, ValueError, "valid must be"),
    ],
)
def test_bad_arguments(changes, error, message):
    call = {"gram": torch.eye(3), "inner": torch.ones(3), "target_sq": torch.tensor(1.0), "k": 2, **changes}
    with pytest.raises(error, match=message):
        ops.match(**call)


# ------------------------------------------------------------------------------- nonnegative least squares


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(30, 12), (10, 25), (12, 12), (5, 1), (1, 5)])
def test_nnls_equals_scipy(shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    a = torch.randn(4, *shape, generator=generator, dtype=F64).to(dtype)
    b = torch.randn(4, shape[0], generator=generator, dtype=F64).to(dtype)
    x = ops.nnls(a, b)
    assert x.shape == (4, shape[1]) and x.dtype == dtype and (x >= 0).all()
    for i in range(4):
        _, best = scipy.optimize.nnls(a[i].double().numpy(), b[i].double().numpy())
        reached = (a[i].double() @ x[i].double() - b[i].double()).norm()
        assert float(reached) == pytest.approx(best, rel=1e-5, abs=1e-6 if dtype == F64 else 1e-5)
        if shape[0] >= shape[1]:
            exact = scipy.optimize.nnls(a[i].double().numpy(), b[i].double().numpy())[0]
            np.testing.assert_allclose(x[i].numpy(), exact, atol=1e-9 if dtype == F64 else 1e-5)
    gram = ops.nnls_gram(a.double().mT @ a.double(), (a.double().mT @ b.double()[..., None])[..., 0])
    if shape[0] >= shape[1]:
        torch.testing.assert_close(gram, x.double(), rtol=1e-5, atol=1e-5)


def test_nnls_with_a_ridge():
    a, b = rows(15, 8), rows(1, 15, seed=4)[0]
    weight = (0.1 * a.square().sum(0).mean()).sqrt()
    tall = torch.cat([a, weight * torch.eye(8, dtype=F64)])
    exact = scipy.optimize.nnls(tall.numpy(), torch.cat([b, b.new_zeros(8)]).numpy())[0]
    np.testing.assert_allclose(ops.nnls(a, b, ridge=0.1).numpy(), exact, atol=1e-10)


def test_nnls_on_valid_rows_and_bad_numbers():
    a, b = rows(15, 8), rows(1, 15, seed=4)[0]
    gram, inner = a.T @ a, a.T @ b
    valid = torch.arange(8) != 3
    x = ops.nnls_gram(gram, inner, valid=valid)
    assert x[3] == 0
    np.testing.assert_allclose(x[valid].numpy(), scipy.optimize.nnls(a[:, valid].numpy(), b.numpy())[0], atol=1e-10)
    pair = torch.stack([a, a])
    pair[0, 2, 3] = torch.nan
    both = ops.nnls(pair, torch.stack([b, b]))
    assert both[0].isnan().all() and torch.equal(both[1], ops.nnls(a, b))
    assert torch.equal(ops.nnls(torch.zeros(3, 2), torch.ones(3)), torch.zeros(2))
    assert ops.nnls(torch.zeros(3, 0), torch.ones(3)).shape == (0,)


def test_nnls_bad_arguments():
    with pytest.raises(ValueError, match="b must be"):
        ops.nnls(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="a must be"):
        ops.nnls(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="ridge must be"):
        ops.nnls(torch.zeros(3, 2), torch.zeros(3), ridge=-1.0)
    with pytest.raises(ValueError, match="inner must be"):
        ops.nnls_gram(torch.zeros(3, 3), torch.zeros(2))
