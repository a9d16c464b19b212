"""Proxies of token outputs against the gradients of whole sequences, formed one by one in float64."""

import pytest
import torch
from support.training_kit import TokenModel, mlp
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import selbp
from selbp.common.proxies import HeadProxies, sequence_gram, sequence_norm_sq
from selbp.selectors import GradientProxies


class Look(selbp.Full):
    """Everything, after reading every proxy."""

    needs = "gradients"

    def select(self, stats, k, *, proxies=None, extras=None, generator=None):
        object.__setattr__(self, "seen", (stats, proxies.gram(), proxies.mean_gradient(), proxies))
        object.__setattr__(self, "rows", (proxies.residual.shape, proxies.features.shape))
        return super().select(stats, k, proxies=proxies)


def look(model, x, y, **options):
    rule = Look()
    selbp.SelectiveBackprop(model, selector=rule, keep=1.0, **options)(x, y)
    return rule


def explicit(model, x, y, sample_loss):
    """(n, P) gradients of each sample's loss with respect to the head's weight and bias."""
    head = {name: p.detach() for name, p in model.named_parameters() if name.startswith(("head", "2"))}
    rest = {name: p.detach() for name, p in model.named_parameters() if name not in head}

    def loss(params, xi, yi):
        return sample_loss(functional_call(model, {**rest, **params}, (xi[None],)), yi[None])

    g = vmap(grad(loss), (None, 0, 0))(head, x, y)
    return torch.cat([part.flatten(1) for part in g.values()], 1)


@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gram_and_mean_of_sequences(loss, smoothing):
    torch.set_default_dtype(torch.float64)
    try:
        model = TokenModel()
        model.mix = torch.nn.Linear(8, 8)  # vmap knows no GRU
        model.forward = lambda ids: model.head(model.mix(model.embed(ids)).tanh())
        x = torch.randint(0, 11, (6, 9))
        y = x.clone()
        y[0, 5:], y[4] = -100, -100
        used = y[:, 1:] if loss == "causal_lm" else y
        scale = 6 / (used != -100).sum()

        def sample_loss(z, yi):
            z, yi = (z[:, :-1], yi[:, 1:]) if loss == "causal_lm" else (z, yi)
            return scale * F.cross_entropy(
                z.flatten(0, 1), yi.flatten(), ignore_index=-100, reduction="sum", label_smoothing=smoothing
            )

        g = explicit(model, x, y, sample_loss)
        rule = look(model, x, y, loss=loss, label_smoothing=smoothing)
    finally:
        torch.set_default_dtype(torch.float32)
    stats, gram, mean, _ = rule.seen
    torch.testing.assert_close(gram, g @ g.T)
    torch.testing.assert_close(mean.inner, g @ g.mean(0))
    torch.testing.assert_close(mean.target_sq, g.mean(0).square().sum())
    torch.testing.assert_close(torch.cat([mean.head_weight.flatten(), mean.head_bias]), g.mean(0))
    torch.testing.assert_close(stats.gradient_norm, g.norm(dim=1))
    assert stats.valid.tolist() == [True, True, True, True, False, True]
    assert rule.rows == ((6, 11), (6, 8))


@pytest.mark.parametrize("loss", ["mse", "bce", "cross_entropy", "callable"])
def test_gram_and_mean_of_plain_samples(loss):
    model = mlp().double()
    x, y = torch.randn(7, 12).double(), torch.rand(7, 5).double()
    if loss == "cross_entropy":
        y = torch.randint(0, 5, (7,))
    functions = {
        "mse": F.mse_loss,
        "bce": F.binary_cross_entropy_with_logits,
        "cross_entropy": F.cross_entropy,
        "callable": lambda o, t: (o - t).abs().pow(3).sum(),
    }
    option = (lambda o, t: (o - t).abs().pow(3).sum(1)) if loss == "callable" else loss
    g = explicit(model, x, y, functions[loss])
    stats, gram, mean, _ = look(model, x, y, loss=option).seen
    torch.testing.assert_close(gram, g @ g.T)
    torch.testing.assert_close(mean.inner, g @ g.mean(0))
    torch.testing.assert_close(stats.gradient_norm, g.norm(dim=1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 40, 30), (5, 30, 4, 3), (1, 1, 1, 1), (4, 7, 1, 9)])
@pytest.mark.parametrize("block_bytes", [1, 2000, 1 << 26])
def test_both_ways_to_a_sequence_gram(monkeypatch, bias, shape, block_bytes):
    monkeypatch.setattr("selbp.common.proxies.BLOCK_BYTES", block_bytes)
    n, length, classes, d = shape
    r, h = torch.randn(n, length, classes).double(), torch.randn(n, length, d).double()
    h1 = torch.cat([h, torch.ones(n, length, 1).double()], 2) if bias else h
    g = torch.einsum("ntc,ntd->ncd", r, h1).flatten(1)
    torch.testing.assert_close(sequence_gram(r, h, bias=bias), g @ g.T)
    torch.testing.assert_close(sequence_norm_sq(r, h, bias=bias), g.square().sum(1))


def test_single_positions_agree_with_the_plain_proxies():
    r, h = torch.randn(6, 4), torch.randn(6, 3)
    plain = GradientProxies(r, h)
    torch.testing.assert_close(sequence_gram(r[:, None], h[:, None]), plain.gram())


class Doubled(HeadProxies):
    """A kind whose mean gradient is not that of its factors."""

    def mean_gradient(self):
        mean = super().mean_gradient()
        return mean._replace(inner=2.0 * mean.inner)


@pytest.mark.parametrize(
    "kind,positions,reduce,given",
    [
        (HeadProxies, 1, None, True),
        (HeadProxies, 2, None, False),
        (HeadProxies, 1, lambda x: x, False),
        (Doubled, 1, None, False),
    ],
    ids=["plain", "sequence", "ranks", "subclass"],
)
def test_factors_are_handed_over_where_everything_follows_from_them(kind, positions, reduce, given):
    torch.manual_seed(0)
    residual, features = torch.randn(20, positions, 3), torch.randn(20, positions, 5)

    def build():
        return kind(lambda: residual, lambda: features, positions=positions, reduce=reduce)

    known = build()
    known.gram(), known.mean_gradient()
    assert known.factors() is None and (build().factors() is not None) == given
    stats = selbp.ops.cross_entropy_statistics(torch.randn(20, 3), torch.randint(3, (20,)))
    proxies = build()
    found, wanted = (selbp.GradientMatching().select(stats, 6, proxies=p) for p in (proxies, known))
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.weights, wanted.weights)
    assert proxies.complete != given  # in one call no Gram matrix is kept
    assert torch.equal(proxies.gram(), known.gram())
    assert torch.equal(proxies.mean_gradient().inner, known.mean_gradient().inner)
