"""The native matching engine: against an oracle that shares no formula with it, KKT, SciPy, bits and hostile input."""

import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selbp import _native, ops, reference
from selbp.types import MatchStatus

DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _one_thread():
    """The oracles run many tiny torch calls, which threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(n, d, *, seed, spread=1.0, external=0.0, dtype=torch.float64):
    """Rows with norms spread over e^spread; the target is their mean plus `external` of something else."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = rows * torch.exp(spread * torch.randn(n, 1, generator=generator, dtype=torch.float64))
    target = rows.mean(0) + external * torch.randn(d, generator=generator, dtype=torch.float64)
    gram, inner, target_sq = rows @ rows.T, rows @ target, target @ target
    return rows, target, gram.to(dtype), inner.to(dtype), target_sq.to(dtype)


def check_invariants(found, n, k, nonnegative=True):
    """What holds of every answer to whatever input."""
    for indices, weights, count, status in zip(
        found.indices.reshape(found.count.numel(), k),
        found.weights.reshape(found.count.numel(), k),
        found.count.reshape(-1),
        found.status.reshape(-1),
        strict=True,
    ):
        count = int(count)
        assert 0 <= count <= min(n, k)
        assert MatchStatus(int(status)) in MatchStatus
        chosen = indices[:count].tolist()
        assert len(set(chosen)) == count and all(0 <= i < n for i in chosen)
        assert (indices[count:] == -1).all() and (weights[count:] == 0).all()
        assert torch.isfinite(weights).all()
        if nonnegative:
            assert (weights >= 0).all()
        assert (status == MatchStatus.FULL) == (count == k) or status == MatchStatus.INVALID


# ------------------------------------------------------------------------------------------------ the greedy path


def greedy_path(rows, target, k, lam):
    """Nonnegative OLS by refitting every candidate from scratch: no factorisation, no update. Also counts removals."""
    rows, target = rows.numpy(), target.numpy()
    n, d = rows.shape
    full = np.vstack([rows.T, np.sqrt(lam) * np.eye(n)]) if lam else rows.T
    rhs = np.concatenate([target, np.zeros(n)]) if lam else target

    def fit(support):
        w = np.linalg.lstsq(full[:, support], rhs, rcond=None)[0]
        return w, np.sum((rhs - full[:, support] @ w) ** 2)

    support, weights, removals = [], np.zeros(0), 0
    while len(support) < k:
        w, objective = fit(support) if support else (np.zeros(0), rhs @ rhs)
        slope = full.T @ (rhs - full[:, support] @ w)
        candidates = [j for j in range(n) if j not in support and slope[j] > 1e-9 * np.linalg.norm(full[:, j])]
        if not candidates:
            break
        support.append(max(candidates, key=lambda j: objective - fit([*support, j])[1]))
        weights = np.append(weights, 0.0)
        while support:
            w, _ = fit(support)
            if (w > 0).all():
                weights = w
                break
            steps = np.full(len(w), np.inf)
            steps[w <= 0] = weights[w <= 0] / (weights[w <= 0] - w[w <= 0])
            weights = weights + steps.min() * (w - weights)
            out = int(steps.argmin())
            support, weights, removals = support[:out] + support[out + 1 :], np.delete(weights, out), removals + 1
    return support, weights, removals


def test_path_is_the_oracles_on_random_problems_with_removals():
    removals = 0
    for seed in range(60):
        n, d = 12 + seed % 9, 8 + seed % 7
        rows, target, gram, inner, target_sq = problem(n, d, seed=seed, spread=0.0, external=0.7)
        k, ridge = n - seed % 4, 1e-2
        support, weights, removed = greedy_path(rows, target, k, ridge * float(gram.diagonal().mean()))
        found = ops.match(gram, inner, target_sq, k, ridge=ridge)
        removals += removed
        assert found.indices[: found.count].tolist() == support
        np.testing.assert_allclose(found.weights[: found.count].numpy(), weights, rtol=1e-7, atol=1e-10)
    assert removals > 20


@pytest.mark.parametrize("rule", ["ols", "normalized", "raw"])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.3])
def test_float64_equals_the_reference(rule, nonnegative, ridge):
    for seed in range(0, 40, 3):
        n = 1 + seed % 33
        _, _, gram, inner, target_sq = problem(n, n + 5, seed=seed, external=0.5 * (seed % 3))
        valid = torch.arange(n) % 5 != 3 if seed % 4 == 0 else None
        arguments = dict(rule=rule, nonnegative=nonnegative, ridge=ridge, valid=valid, tolerance=0.1 * (seed % 2))
        k = 1 + seed % 17
        found = ops.match(gram, inner, target_sq, k, **arguments)
        spec = reference.match(gram, inner, target_sq, k, **arguments)
        assert torch.equal(found.indices, spec.indices) and found.status == spec.status
        torch.testing.assert_close(found.weights, spec.weights, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(found.residual, spec.residual, rtol=1e-7, atol=1e-7)


# ---------------------------------------------------------------------------------------------- KKT and SciPy's NNLS


def count_with_removals(gram, inner, target_sq):
    """Problems whose choice of j + 1 rows does not extend their choice of j: a row left in between."""
    n = inner.shape[-1]
    before, left = torch.full((len(inner), 0), -1), torch.zeros(len(inner), dtype=torch.bool)
    for k in range(1, n + 1):
        now = ops.match(gram, inner, target_sq, k, ridge=0.0).indices
        left |= (now[:, : k - 1] != before).any(1)
        before = now
    return int(left.sum())


def test_nnls_has_scipys_objective_and_satisfies_kkt_on_700_problems_with_removals():
    removals = 0
    for n, d in [(12, 8), (24, 16), (33, 20), (48, 40)]:
        problems = [problem(n, d, seed=1000 + seed, external=1.0) for seed in range(300)]
        gram, inner, target_sq = (torch.stack([p[i] for p in problems]) for i in (2, 3, 4))
        removals += count_with_removals(gram, inner, target_sq)
        found = ops.match(gram, inner, target_sq, n, ridge=0.0)
        check_invariants(found, n, n)
        for i, (rows, target, *_) in enumerate(problems):
            x = torch.zeros(n, dtype=torch.float64)
            count = int(found.count[i])
            x[found.indices[i, :count]] = found.weights[i, :count]
            residual = target - rows.T @ x
            slope = rows @ residual / (rows.norm(dim=1) * target.norm())
            assert slope.max() < 1e-8 and slope[x > 0].abs().sum() < 1e-7
            theirs = torch.from_numpy(scipy.optimize.nnls(rows.T.numpy(), target.numpy())[0])
            norm_sq = (target - rows.T @ theirs).square().sum()  # SciPy 1.15 reports that of another x
            assert residual.square().sum() <= norm_sq * (1 + 1e-9) + 1e-18 * target_sq[i]
    assert removals >= 700


def test_float32_objective_is_within_three_times_eager_error():
    for seed in range(20):
        rows, target, gram, inner, target_sq = problem(96, 200, seed=seed, external=0.3)
        spec = ops.match(gram, inner, target_sq, 24)
        found = ops.match(gram.float(), inner.float(), target_sq.float(), 24)
        support = found.indices[: found.count]
        ridged = gram[support][:, support] + 1e-3 * gram.diagonal().mean() * torch.eye(len(support))
        exact = torch.linalg.solve(ridged, inner[support])
        eager = torch.linalg.solve(ridged.float(), inner[support].float())
        error, eager_error = (found.weights[: found.count] - exact).norm(), (eager - exact).norm()
        assert error <= 3 * eager_error + 1e-6 * exact.norm()
        assert float(found.residual) <= float(spec.residual) * (1 + 1e-3)


# -------------------------------------------------------------------------------------------------------- regressions


def test_a_row_without_correlation_at_first_is_not_forgotten():
    rows = torch.tensor([[1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    target = torch.tensor([1.0, 0.0], dtype=torch.float64)  # row 1 is orthogonal to it until row 0 is chosen
    for rule in ops.matching.RULES:
        found = ops.match(rows @ rows.T, rows @ target, target @ target, 2, rule=rule, ridge=0.0)
        assert found.indices.tolist() == [0, 1] and found.status == MatchStatus.FULL
        torch.testing.assert_close(found.weights, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_false_kkt_stop_among_near_parallel_rows(dtype):
    """Near-parallel rows leave in the turn they enter; the stop must still be one that the KKT conditions justify."""
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        rows = base[torch.arange(40) % 6] + 10.0 ** -(1 + seed % 6) * torch.randn(
            40, 12, generator=generator, dtype=torch.float64
        )
        target = torch.randn(12, generator=generator, dtype=torch.float64)
        gram, inner, target_sq = rows @ rows.T, rows @ target, target @ target
        found = ops.match(gram.to(dtype), inner.to(dtype), target_sq.to(dtype), 40, ridge=1e-3)
        check_invariants(found, 40, 40)
        x = torch.zeros(40, dtype=torch.float64)
        x[found.indices[: found.count]] = found.weights[: found.count].double()
        lam = 1e-3 * gram.diagonal().mean()
        slope = (inner - gram @ x - lam * x) / (gram.diagonal() * target_sq).sqrt()
        assert slope.max() < (1e-9 if dtype == torch.float64 else 3e-4)
        assert found.status == MatchStatus.OPTIMAL


# --------------------------------------------------------------------------------------------------------------- bits


def raw(gram, inner, target_sq, k, near_bytes, threads=1, nonnegative=True):
    """The native call itself, with its lookahead threshold."""
    n, dtype = inner.shape[-1], inner.dtype
    out = [
        torch.empty(k, dtype=torch.int64),
        torch.empty(k, dtype=dtype),
        torch.empty((), dtype=torch.int32),
        torch.empty((), dtype=dtype),
        torch.empty((), dtype=torch.uint8),
    ]
    buffers = [gram.data_ptr(), inner.data_ptr(), target_sq.data_ptr(), 0, *(x.data_ptr() for x in out)]
    _native.match(buffers, dtype == torch.float64, 1, n, k, 0, nonnegative, 1e-3, 0.0, threads, near_bytes)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,k,external", [(40, 20, 0.0), (129, 129, 3.0), (300, 75, 0.0), (257, 200, 1.0)])
def test_lookahead_changes_no_bit(dtype, n, k, external):
    _, _, gram, inner, target_sq = problem(n, n // 2 + 3, seed=n, external=external, dtype=dtype)
    for nonnegative in (True, False):
        near, far = (raw(gram, inner, target_sq, k, b, nonnegative=nonnegative) for b in (1 << 40, 0))
        assert all(torch.equal(x, y) for x, y in zip(near, far, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads_or_the_place_in_a_batch(dtype):
    problems = [problem(50, 30, seed=seed, external=1.0, dtype=dtype)[2:] for seed in range(24)]
    batch = [torch.stack(x) for x in zip(*problems, strict=True)]
    alone = [ops.match(*p, 20) for p in problems]
    serial = ops.match(*batch, 20)
    torch.set_num_threads(4)
    parallel = ops.match(*(x.repeat(200, *[1] * (x.dim() - 1)) for x in batch), 20)  # enough work to wake them
    parallel = [x[-24:] for x in parallel]
    order = torch.randperm(24)
    shuffled = ops.match(*(x[order] for x in batch), 20)
    for i, single in enumerate(alone):
        place = int((order == i).nonzero())
        for a, b, c, d in zip(single, serial, parallel, shuffled, strict=True):
            assert torch.equal(a, b[i]) and torch.equal(a, c[i]) and torch.equal(a, d[place])


def test_levels_with_fused_multiply_add_agree_to_the_bit():
    if _native.level() != "x86-64-v4":
        pytest.skip("needs a machine with two levels that fuse: x86-64-v3 and v4")
    code = """
import torch
from selbp import ops
a = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).double()
f = ops.match((a @ a.T).float(), (a @ a.mean(0)).float(), a.mean(0).square().sum().float(), 150)
said = f"{f.indices.tolist()} {f.weights.view(torch.int32).tolist()} {float(f.residual)}"
"""
    here = {}
    exec(code, here)
    v3 = {**os.environ, "SELBP_CPU_LEVEL": "v3"}
    command = [sys.executable, "-c", code + "print(said, end='')"]
    there = subprocess.run(command, env=v3, check=True, capture_output=True, text=True, timeout=600).stdout
    assert here["said"] == there and len(there) > 1000


# ------------------------------------------------------------------------------------------------------- hostile input


def test_an_invalid_problem_leaves_its_neighbours_alone():
    _, _, gram, inner, target_sq = problem(20, 10, seed=3)
    clean = ops.match(gram, inner, target_sq, 6)
    batch = [x.repeat(8, *[1] * x.dim()) for x in (gram, inner, target_sq)]
    batch[0][1, 4, 7] = torch.nan
    batch[0][2, 19, 19] = torch.inf
    batch[1][3, 5] = -torch.inf
    batch[2][4] = torch.nan
    batch[2][5] = -1.0
    found = ops.match(*batch, 6)
    for i in range(8):
        if 1 <= i <= 5:
            assert found.status[i] == MatchStatus.INVALID and found.count[i] == 0 and found.residual[i].isnan()
            assert (found.indices[i] == -1).all() and (found.weights[i] == 0).all()
        else:
            assert all(torch.equal(x[i], y) for x, y in zip(found, clean, strict=True))
    valid = torch.ones(20, dtype=torch.bool)
    valid[7] = False
    masked = ops.match(batch[0][1], inner, target_sq, 6, valid=valid)
    expected = ops.match(gram, inner, target_sq, 6, valid=valid)
    assert torch.equal(masked.indices, expected.indices) and torch.equal(masked.weights, expected.weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [-60, -37, -20, 0, 20, 37])
def test_scales(dtype, exponent):
    _, _, gram, inner, target_sq = problem(30, 20, seed=5, dtype=dtype)
    plain = ops.match(gram, inner, target_sq, 8)
    scale = 2.0**exponent  # of the rows and of the target
    moved = ops.match(gram * scale * scale, inner * scale * scale, target_sq * scale * scale, 8)
    assert all(torch.equal(x, y) for x, y in zip(plain, moved, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_graded_over_twenty_decades(dtype):
    rows = torch.eye(21, dtype=torch.float64) * 10.0 ** torch.arange(0, -21, -1, dtype=torch.float64)[:, None]
    target = torch.ones(21, dtype=torch.float64)
    gram, inner, target_sq = (x.to(dtype) for x in (rows @ rows.T, rows @ target, target @ target))
    found = ops.match(gram, inner, target_sq, 21, ridge=0.0)
    check_invariants(found, 21, 21)
    if dtype == torch.float64:
        assert found.count == 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_strided_and_misaligned_inputs(dtype):
    _, _, gram, inner, target_sq = problem(37, 50, seed=8, dtype=dtype)
    plain = ops.match(gram.float(), inner.float(), target_sq.float(), 9)
    assert plain.weights.dtype == torch.float32
    wide = torch.zeros(75, 39, dtype=dtype)
    wide[1::2, 1:38] = gram
    offset = torch.zeros(38, dtype=dtype)
    offset[1:] = inner
    for candidate in (gram, gram.T, wide[1::2, 1:38]):
        found = ops.match(candidate, offset[1:], target_sq, 9)
        assert all(torch.equal(x, y) for x, y in zip(plain, found, strict=True))


ROWS = st.sampled_from(["random", "zero", "equal", "duplicates", "parallel", "mean_zero", "negative", "rank_one"])


@settings(max_examples=150, deadline=None)
@given(
    kind=ROWS,
    n=st.integers(0, 40),
    d=st.integers(1, 12),
    extra=st.integers(-40, 3),
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(ops.matching.RULES),
    nonnegative=st.booleans(),
    ridge=st.sampled_from([0.0, 1e-3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    masked=st.booleans(),
)
def test_degenerate_problems(kind, n, d, extra, seed, rule, nonnegative, ridge, dtype, masked):
    k = max(0, n + extra)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "zero":
        rows[:: 1 + seed % 3] = 0
    elif kind == "equal":
        rows = rows[:1].repeat(n, 1)
    elif kind == "duplicates":
        rows = rows[torch.arange(n) % max(1, n // 3)] if n else rows
    elif kind == "parallel":
        rows = rows[:1] + 1e-7 * rows
    elif kind == "mean_zero":
        rows = rows - rows.mean(0)
    elif kind == "rank_one":
        rows = rows[:, :1] * torch.ones(d, dtype=torch.float64)
    target = rows.mean(0) if n else torch.zeros(d, dtype=torch.float64)
    if kind == "negative":
        rows = rows.abs()
        target = -torch.ones(d, dtype=torch.float64)
    valid = torch.rand(n, generator=generator) > 0.3 if masked else None
    gram, inner, target_sq = ((rows @ rows.T).to(dtype), (rows @ target).to(dtype), (target @ target).to(dtype))
    found = ops.match(gram, inner, target_sq, k, rule=rule, ridge=ridge, nonnegative=nonnegative, valid=valid)
    check_invariants(found, n, k, nonnegative)
    assert found.status != MatchStatus.INVALID
    if valid is not None:
        assert valid[found.indices[: found.count]].all()
    if kind == "negative" and nonnegative:
        assert found.count == 0 and found.status == (MatchStatus.OPTIMAL if k else MatchStatus.FULL)
    if nonnegative:  # a feasible point that lowers the ridged objective cannot be worse than nothing
        assert found.residual <= 1 + 1e-3


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(min_size=64, max_size=4096),
    k=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(ops.matching.RULES),
    nonnegative=st.booleans(),
    batch=st.integers(1, 3),
)
def test_random_bytes(data, k, dtype, rule, nonnegative, batch):
    """Bytes read as numbers: no Gram matrix, mostly. Never a crash, a NaN weight or a repeated row."""
    values = torch.frombuffer(bytearray(data[: len(data) // 8 * 8]), dtype=dtype)
    n = int((len(values) // batch + 0.25) ** 0.5 - 0.5)
    need = n * n + n
    values = values[: batch * need].reshape(batch, need) if n else torch.zeros(batch, 0, dtype=dtype)
    gram, inner = values[:, : n * n].reshape(batch, n, n), values[:, n * n :]
    for symmetric in (gram, gram.abs().clamp(max=1e30), gram + gram.mT):
        found = ops.match(
            symmetric, inner, inner.abs().amax(1) if n else inner.sum(1), k, rule=rule, nonnegative=nonnegative
        )
        check_invariants(found, n, k, nonnegative)


# ---------------------------------------------------------------------------------------------------------------- nnls


@pytest.mark.parametrize("shape", [(9, 5), (30, 30), (20, 45)])
def test_nnls_is_scipys(shape):
    a = torch.randn(12, *shape, dtype=torch.float64)
    b = torch.randn(12, shape[0], dtype=torch.float64)
    x = ops.nnls(a, b)
    for i in range(12):
        _, norm = scipy.optimize.nnls(a[i].numpy(), b[i].numpy())
        assert (a[i] @ x[i] - b[i]).norm() ** 2 <= norm**2 * (1 + 1e-9) + 1e-14
        assert (x[i] >= 0).all()
    gram, inner = a.mT @ a, (a.mT @ b[..., None])[..., 0]
    torch.testing.assert_close(gram @ ops.nnls_gram(gram, inner)[..., None], gram @ x[..., None], rtol=1e-6, atol=1e-6)
