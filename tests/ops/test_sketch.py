"""Sketches of sequences' gradients: exact as a projection, unbiased, of the documented variance, enough to match on."""

import pytest
import torch
from support.loss_cases import DTYPES, assert_error, compute_dtype, double

from selbp import ops, reference
from selbp.ops import _logit_pass


def sequences(n, length, d, n_classes, dtype=torch.float64, bias=True):
    features = torch.randn(n, length, d).to(dtype)
    weight = (torch.randn(n_classes, d) / d**0.5).to(dtype)
    target = torch.randint(n_classes, (n, length))
    target[0, 0] = -100
    return features, weight, torch.randn(n_classes).to(dtype) if bias else None, target


def exact_gradients(features, weight, bias, target):
    """(n, C, d (+ 1)) head gradient of each sequence's summed loss, by autograd."""
    gradients = []
    for h, y in zip(features, target, strict=True):
        w = weight.detach().requires_grad_()
        b = torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias.detach()
        b.requires_grad_()
        loss = torch.nn.functional.cross_entropy(h @ w.t() + b, y, reduction="sum")
        dw, db = torch.autograd.grad(loss, (w, b))
        gradients.append(dw if bias is None else torch.cat([dw, db[:, None]], 1))
    return torch.stack(gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_is_the_projection_of_the_gradient(bias, monkeypatch):
    monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 1)
    monkeypatch.setattr(_logit_pass, "_TILE_ROWS", 7)
    problem = sequences(4, 5, 6, 150, bias=bias)
    left, right = ops.sketch_projections(150, 6 + bias, (8, 3), dtype=torch.float64)
    expected = left.t() @ exact_gradients(*problem) @ right
    torch.testing.assert_close(ops.sketch(*problem, (left, right)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.1, "softcap": 3.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(dtype, options, monkeypatch):
    monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 1)  # two tiles of classes
    compute = compute_dtype(dtype)
    features, weight, bias, target = sequences(3, 4, 8, 90, dtype)
    class_weight = torch.rand(90).to(dtype)
    left, right = ops.sketch_projections(90, 9, (5, 6), kind="gaussian", dtype=compute)
    ours = ops.sketch(features, weight, bias, target, (left, right), class_weight=class_weight, **options)
    assert ours.dtype == compute
    exact = reference.sketch(
        double(features),
        double(weight),
        double(bias),
        target,
        double(left),
        double(right),
        class_weight=double(class_weight),
        **options,
    )
    # Eager torch's logits are rounded to the features' dtype, as ours are; everything after is wide.
    assert_error("sketch", ours, exact, exact, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", ["sign", "gaussian"])
def test_inner_products_are_unbiased_with_the_documented_variance(kind):
    problem = sequences(2, 6, 5, 7)
    gradients = exact_gradients(*problem).flatten(1)
    gram = gradients @ gradients.t()
    p, q, draws = 6, 4, 1000
    samples = torch.stack(
        [
            ops.sketch_gram(
                ops.sketch(*problem, ops.sketch_projections(7, 6, (p, q), kind=kind, seed=seed, dtype=torch.float64))
            )
            for seed in range(draws)
        ]
    )
    z = (samples.mean(0) - gram) / (samples.std(0) / draws**0.5)
    assert float(z.abs().max()) < 4.5
    norms = gram.diagonal()
    bound = ((1 + 2 / p) * (1 + 2 / q) - 1) * norms[:, None] * norms
    assert (samples.var(0) < 1.15 * bound).all()
    wrong = samples * 1.4  # a planted bug: projections with E[P P^T] = 1.4 I
    assert float(((wrong.mean(0) - gram) / (wrong.std(0) / draws**0.5)).abs().max()) > 4.5


def test_matching_on_sequences_through_sketches():
    features, weight, bias, target = sequences(24, 10, 12, 30)
    gradients = exact_gradients(features, weight, bias, target).flatten(1)
    exact = gradients @ gradients.t()
    sketched = ops.sketch(features, weight, bias, target, ops.sketch_projections(30, 13, (24, 12), dtype=torch.float64))
    gram = ops.sketch_gram(sketched)

    def residual(matrix):
        chosen = ops.match(matrix, matrix.mean(1), matrix.mean(), 8)
        w = torch.zeros(24, dtype=torch.float64)
        w[chosen.indices[chosen.indices >= 0]] = chosen.weights[chosen.indices >= 0]
        gap = w - 1 / 24
        return float((gap @ exact @ gap).clamp(min=0).sqrt() / exact.mean().sqrt())

    assert residual(gram) < 0.8  # of the true mean gradient, which it never saw
    assert residual(exact) <= residual(gram) + 1e-9 < 1.0


def test_tokens_that_are_not_finite_contribute_nothing():
    features, weight, bias, target = sequences(3, 4, 5, 9)
    projections = ops.sketch_projections(9, 6, (4, 4), dtype=torch.float64)
    target[1, 2] = -100
    expected = ops.sketch(features, weight, bias, target, projections)
    target[1, 2] = 3
    features[1, 2, 0] = torch.nan
    torch.testing.assert_close(ops.sketch(features, weight, bias, target, projections), expected)


def test_the_seed_decides():
    a, b = (ops.sketch_projections(50, 7, (4, 3), seed=seed) for seed in (1, 2))
    again = ops.sketch_projections(50, 7, (4, 3), seed=1)
    assert torch.equal(a[0], again[0]) and torch.equal(a[1], again[1]) and not torch.equal(a[0], b[0])
    assert set(a[0].unique().tolist()) == {-0.5, 0.5}
