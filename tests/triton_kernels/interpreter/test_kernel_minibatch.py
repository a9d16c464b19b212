"""The kernels of a minibatch's vectors and the operators of a step on a GPU, in the interpreter."""

import importlib

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.ops import _backends
from selbp.ops import minibatch as operators

matching_operator, matched, scored = (
    importlib.import_module(f"selbp.ops.{name}") for name in ("matching", "match_gradients", "score_minibatch")
)


def drawn(n, seed=0):
    return torch.Generator().manual_seed(seed + n)


def same(found, expected):
    """Equal numbers, NaN where there is NaN; sums of float64 in another order may round to the next float32."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a.double(), b.double(), 2**-23, 0, equal_nan=True)
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 7, 1025])
def test_unscored(n, weighted):
    generator = drawn(n)
    target = torch.randint(0, 5, (n,), generator=generator)
    target[::4], target[1::9] = 4, -7
    finite = torch.rand(n, generator=generator) > 0.2
    arguments = (target, finite, torch.rand(5, generator=generator) if weighted else None, 4, False)
    assert same(operators._unscored_cuda(*arguments), operators._unscored(*arguments))
    none = (target, torch.zeros(n, dtype=torch.bool), *arguments[2:])
    assert same(operators._unscored_cuda(*none), operators._unscored(*none))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (9, 300), (17, 2, 5)], ids=str)
def test_finite_rows(shape, dtype):
    x = torch.randn(shape, generator=drawn(shape[0])).to(dtype)
    assert operators._finite_cuda(x).all()
    flat = x.view(len(x), -1)
    flat[0, -1], flat[len(x) // 2, 0] = torch.nan, -torch.inf
    assert torch.equal(operators._finite_cuda(x), operators.plain_finite_rows(x))
    assert torch.equal(operators._finite_cuda(x.transpose(0, -1)), operators.plain_finite_rows(x.transpose(0, -1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "n_classes"), [(1, 1), (37, 10), (200, 3), (5, 1500)])
def test_hits(n, n_classes, dtype):
    generator = drawn(n)
    logits = torch.randn(n, n_classes, generator=generator).mul(2).round().to(dtype)  # ties
    target = torch.randint(0, n_classes, (n,), generator=generator)
    target[::2] = logits.float().argmax(1)[::2]
    target[3::11], target[5::13] = -100, n_classes
    logits[::7, n_classes // 2] = torch.nan
    logits[::14, n_classes - 1] = torch.nan
    logits[4::9, 0] = torch.inf
    live = torch.rand(n, generator=generator) > 0.2
    found = operators._hits_cuda(logits, target, live, -100)
    assert torch.equal(found, operators._hits(logits, target, live, -100))


@pytest.mark.parametrize("k", [0, 1, 33, 1025])
def test_weighted_loss(k):
    generator = drawn(k)
    losses, weights = (torch.rand(k, generator=generator) for _ in range(2))
    losses[::5], weights[::5] = torch.nan, 0.0  # of slots that do not train
    scale = torch.tensor(1.25)
    (loss, scaled), (expected, others) = (f(losses, scale, weights) for f in (operators._loss_cuda, operators._loss))
    assert torch.equal(scaled.nan_to_num(), others.nan_to_num())
    exact = (losses.double() * 1.25 * weights.double()).nan_to_num().sum()
    assert abs(loss - exact) <= 2 * abs(expected - exact) + 2**-23 * exact + 2**-23 * 2 * exact  # products are rounded


@pytest.mark.parametrize("factors", ["none", "residual", "both"])
@pytest.mark.parametrize("option", ["plain", "weight", "smoothing", "everything"])
def test_a_minibatch_at_once(option, factors):
    case = cases.make(33, 24, 65, torch.float32, option, bias=True)
    case.features[4, 2], case.target[4] = torch.nan, 3
    logits = case.logits.nan_to_num()
    options = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, **case.options}

    def run(function, dtype):
        c = case.to(dtype)
        weight = options["class_weight"]
        flat = {**options, "class_weight": None if weight is None else weight.to(dtype)}
        return function(*scored._pack(logits.to(dtype), c.target, c.features, *flat.values(), True, factors))

    got, spec, eager = (
        run(scored._cuda, torch.float32),
        run(scored._composed, torch.float64),
        run(scored._composed, torch.float32),
    )
    cases.assert_statistics(got[:6], spec[:6], eager[:6])
    for index, name in ((6, "mass"), (7, "scaled"), (8, "scale")):
        cases.assert_close(name, got[index], spec[index], eager[index])
    assert torch.equal(got[9], spec[9])
    smooth = "label_smoothing" in case.options
    cases.assert_close("residual", got[10], spec[10], eager[10], smallest=1e-2 if smooth else 1e-6)
    assert torch.equal(got[11], eager[11])


def test_what_is_not_small_takes_the_operators(monkeypatch):
    """Float64, and more rows or classes than the kernels hold."""
    case = cases.make(9, 4, 12, bias=True)
    arguments = scored._pack(case.logits, case.target, case.features, None, -100, 0.0, 0.0, True, "both")
    found = scored._cuda(*arguments)
    fused = _backends.kernels(case.logits)
    monkeypatch.setattr(fused.stored, "MOST_ROWS", 8)
    monkeypatch.setattr(fused, "score_minibatch", None)
    assert same(scored._cuda(*arguments)[6:7], found[6:7])
    monkeypatch.setattr(fused.stored, "MOST_ROWS", 4096)
    monkeypatch.setattr(fused.stored, "MOST_CLASSES", 11)
    assert same(scored._cuda(*arguments)[6:7], found[6:7])
    wide = scored._pack(case.logits.double(), case.target, case.features.double(), None, -100, 0.0, 0.0, True, "both")
    assert scored._cuda(*wide)[0].dtype == torch.float64


@pytest.mark.parametrize("finite", [False, True])
def test_matching_from_factors(finite, monkeypatch):
    """Gram matrix, mean gradient and match, with the host's solver in the place of the GPU's."""
    torch.manual_seed(5)
    residual, features = torch.randn(40, 7), torch.randn(40, 12)
    valid = torch.arange(40) % 5 != 1
    residual[~valid] = 0.0
    if not finite:
        features[6, 3] = torch.nan  # not valid
        residual[9, 2], valid[9] = torch.inf, False
    asked = []

    def solve(gram, inner, target_sq, k, rule, ridge, nonnegative, mask, tolerance, fill=False):
        asked.append(fill)
        return matching_operator._cpu(gram, inner, target_sq, k, rule, ridge, nonnegative, mask, tolerance)

    monkeypatch.setattr(matching_operator, "_cuda", solve)
    indices, weights, gram, inner, target_sq, head_weight, head_bias = matched._cuda(
        residual, features, valid, True, matched.Search(12, "ols", 1e-3, True, finite)
    )
    spec = reference.mean_gradient(residual.double(), features.double())
    wanted = reference.gradient_gram(residual.double(), features.double())
    assert asked == [True]
    assert torch.allclose(gram.double(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    for ours, exact in zip((inner, target_sq, head_weight, head_bias), spec, strict=True):
        assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    found = reference.match(wanted, spec.inner, spec.target_sq, 12, valid=valid)
    assert torch.equal(indices, found.indices) and torch.allclose(weights.double(), found.weights, atol=1e-4)
