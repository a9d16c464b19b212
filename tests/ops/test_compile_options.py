"""Every operator in one graph: dynamic shapes, and options that change from call to call."""

import pytest
import torch

from selbp import ops

torch.manual_seed(3)
F, W, Y = torch.randn(6, 4), torch.randn(7, 4), torch.randint(0, 7, (6,))
Z, K, B = F @ W.T, torch.eye(6) + 0.1, torch.rand(6)
T, P = Y.view(2, 3), ops.sketch_projections(7, 4, (2, 3))

# (the option's values, the call)
OPTIONS = {
    "linear_cross_entropy label_smoothing": (
        (0.1, 0, 0.25, 1.0),
        lambda v: ops.linear_cross_entropy(F, W, None, Y, label_smoothing=v),
    ),
    "linear_cross_entropy softcap": ((5.0, 0.0, 7.5), lambda v: ops.linear_cross_entropy(F, W, None, Y, softcap=v)),
    "linear_cross_entropy skip_mass": ((0.1, 0.0, 0.5), lambda v: ops.linear_cross_entropy(F, W, None, Y, skip_mass=v)),
    "linear_cross_entropy ignore_index": (
        tuple(range(-3, 9)),
        lambda v: ops.linear_cross_entropy(F, W, None, Y, ignore_index=v),
    ),
    "statistics label_smoothing": ((0.1, 0.2, 0.3), lambda v: ops.cross_entropy_statistics(Z, Y, label_smoothing=v)),
    "statistics ignore_index": (tuple(range(-3, 9)), lambda v: ops.cross_entropy_statistics(Z, Y, ignore_index=v)),
    "statistics bias": ((True, False), lambda v: ops.cross_entropy_statistics(Z, Y, F, bias=v)),
    "linear statistics softcap": (
        (1.0, 2.0, 3.0),
        lambda v: ops.linear_cross_entropy_statistics(F, W, None, Y, softcap=v),
    ),
    "residual label_smoothing": ((0.1, 0.2, 0.3), lambda v: ops.residual(Z, Y, Z.logsumexp(1), label_smoothing=v)),
    "residual ignore_index": (tuple(range(-3, 9)), lambda v: ops.residual(Z, Y, Z.logsumexp(1), ignore_index=v)),
    "match k": (tuple(range(12)), lambda v: ops.match(K, B, B.mean(), v)),
    "match ridge": ((0.1, 0, 1e-3), lambda v: ops.match(K, B, B.mean(), 3, ridge=v)),
    "match tolerance": ((0.0, 0.5, 0.9), lambda v: ops.match(K, B, B.mean(), 3, tolerance=v)),
    "match rule": (("ols", "raw", "normalized"), lambda v: ops.match(K, B, B.mean(), 3, rule=v)),
    "nnls ridge": ((0.0, 0.5, 1.0), lambda v: ops.nnls(F, B, ridge=v)),
    "nnls_gram ridge": ((0.0, 0.5, 1.0), lambda v: ops.nnls_gram(K, B, ridge=v)),
    "sketch label_smoothing": (
        (0.0, 0.1, 0.2),
        lambda v: ops.sketch(F.view(2, 3, 4), W, None, T, P, label_smoothing=v),
    ),
    "a scale": ((0.5, 1.5, 2.5), lambda v: ops.cross_entropy_statistics(Z * v, Y)),
}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def same(a, b):
    a, b = ((x,) if isinstance(x, torch.Tensor) else x for x in (a, b))
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("values,call", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_that_change(values, call, dynamic):
    """Integers become symbols and never compile again; a number is compiled for, as torch does for any operator's."""
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for value in values:
        same(compiled(value), call(value))


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_gradients_under_options_that_change(dynamic):
    def gradient(weight, smoothing, index):
        loss = ops.linear_cross_entropy(F, weight, None, Y, label_smoothing=smoothing, ignore_index=index)
        return torch.autograd.grad(loss.sum(), weight)[0]

    def loss(weight, smoothing, index):
        return ops.linear_cross_entropy(F, weight, None, Y, label_smoothing=smoothing, ignore_index=index).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for smoothing, index in ((0.1, -100), (0.2, 3), (0.3, 5)):
        weight = W.clone().requires_grad_()
        compiled(weight, smoothing, index).backward()
        torch.testing.assert_close(weight.grad, gradient(W.clone().requires_grad_(), smoothing, index))


def test_all_options_that_change_together():
    def call(smoothing, softcap, index, k, ridge):
        loss = ops.linear_cross_entropy(
            F, W, None, Y, label_smoothing=smoothing, softcap=softcap, ignore_index=index, return_statistics=True
        )[1].loss
        stats = ops.cross_entropy_statistics(Z, Y, label_smoothing=smoothing, softcap=softcap, ignore_index=index)
        r = ops.residual(Z, Y, stats.lse, label_smoothing=smoothing, softcap=softcap, ignore_index=index)
        return loss, r, ops.match(K, B, B.mean(), k, ridge=ridge).weights, ops.nnls(F, B, ridge=ridge)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for values in ((0.1, 5.0, -100, 2, 0.1), (0.2, 0.0, 3, 4, 0.2), (0, 7.0, 5, 9, 0)):
        same(compiled(*values), call(*values))


@pytest.mark.parametrize("value", [1.5, float("nan"), -0.1], ids=str)
def test_a_wrong_option_is_refused_in_a_graph(value):
    compiled = torch.compile(
        lambda v: ops.cross_entropy_statistics(Z, Y, label_smoothing=v), backend="aot_eager", fullgraph=True
    )
    compiled(0.1)
    with pytest.raises(Exception, match=r"label_smoothing must be in \[0, 1\]"):
        compiled(value)
