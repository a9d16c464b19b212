"""What every backend of ``selbp.ops.match`` must do, checked against scipy and a greedy search by exhaustion."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import torch
from support.matching_cases import F32, F64, FLOOR, RULES, check, problem, ridged, rows

from selbp import ops, reference
from selbp.ops import MatchStatus


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n,k,batch", [(64, 16, 40), (600, 150, 1)])
def test_a_cuda_graph_replays_the_answer(n, k, batch):
    """Capture fails at any synchronisation, and at memory that does not come from torch's allocator."""
    arguments = [x.cuda() for x in problem(rows(batch * n, n // 2, dtype=F32).reshape(batch, n, -1))]
    found = ops.match(*arguments, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.match(*arguments, k)
    for x in captured:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, captured, strict=True))
