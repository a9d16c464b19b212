"""Sequences of different lengths: gradients by sketches, and losses by the token."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, samples
from torch import nn
from torch.nn import functional as F

import selbp
from selbp import ops


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def batch(n=16, length=9):
    ids = torch.randint(0, 11, (n, length))
    labels = ids.clone()
    for i in range(n):
        labels[i, : i % (length - 1)] = -100
    return ids, labels


class Spy(selbp.GradientMatching):
    """Remembers what it was given."""

    def select(self, stats, k, *, proxies=None, extras=None, generator=None):
        object.__setattr__(self, "seen", (stats, proxies))
        return super().select(stats, k, proxies=proxies, extras=extras, generator=generator)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("loss", ["causal_lm", "callable"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_sketches_are_those_of_the_operator_and_the_step_trains_on_its_choice(backward, loss, bias):
    model, (ids, labels) = TokenModel(), batch()
    if not bias:
        model.head = nn.Linear(8, 11, bias=False)

    def losses(output, target):
        entries = F.cross_entropy(output[:, :-1].transpose(1, 2), target[:, 1:], reduction="none")
        return entries.sum(1)

    rule = Spy()
    step = selbp.SelectiveBackprop(
        model, selector=rule, keep=0.25, loss=losses if loss == "callable" else loss, backward=backward, proxy="sketch"
    )
    got = gradients(model, step(ids, labels))
    stats, proxies = rule.seen
    scale = 1.0 if loss == "callable" else len(ids) / int((labels[:, 1:] != -100).sum())
    hidden = model.mix(model.embed(ids))[0].detach()
    drawn = ops.sketch_projections(11, 8 + bias, (64, 64), dtype=torch.float64)
    h, y = hidden[:, :-1].contiguous(), labels[:, 1:].contiguous()
    want = ops.sketch(h, model.head.weight.detach(), model.head.bias if bias else None, y, drawn) * scale
    torch.testing.assert_close(proxies.gram(), ops.sketch_gram(want), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stats.gradient_norm, want.flatten(1).norm(dim=1), rtol=1e-9, atol=1e-12)
    chosen = (losses(model(ids), labels) * scale).index_select(0, step.report.selection.indices)
    assert_same(got, gradients(model, (chosen * step.report.selection.weights).sum()), 1e-10)
    assert 0 < step.report.relative_residual < 1.5


def test_sketched_products_are_near_the_exact_ones():
    """Within five standard deviations of the bound in ``selbp.ops.sketch``, for every pair."""
    model, (ids, labels) = TokenModel(), batch()
    grams = []
    for proxy in ("sketch", "exact"):
        rule = Spy()
        selbp.SelectiveBackprop(model, selector=rule, keep=0.25, loss="causal_lm", proxy=proxy)(ids, labels)
        grams.append(rule.seen[1].gram())
    norm = grams[1].diagonal().sqrt()
    bound = 5 * ((1 + 2 / 64) ** 2 - 1) ** 0.5 * norm[:, None] * norm[None]
    assert ((grams[0] - grams[1]).abs() <= bound + 1e-12).all()


def test_one_position_a_sample_is_compared_exactly():
    model, (x, y) = nn.Linear(12, 5), samples()
    chosen = []
    for proxy in ("sketch", "exact"):
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, proxy=proxy)
        step(x, y)
        chosen.append((step.report.selection, step.report.relative_residual))
    assert torch.equal(chosen[0][0].indices, chosen[1][0].indices) and chosen[0][1] == chosen[1][1]


@pytest.mark.parametrize("options", [{"head_gradient": "full"}, {"cut": "mix"}], ids=["full-head", "cut"])
def test_what_needs_exact_gradients_refuses_sketches(options):
    with pytest.raises(ValueError, match='proxy="sketch" goes with none of'):
        selbp.SelectiveBackprop(TokenModel(), selector=selbp.GradientMatching(), keep=0.25, proxy="sketch", **options)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "class-weights"])
def test_the_greatest_loss_of_a_token(backward, weighted):
    model, (ids, labels) = TokenModel(), batch()
    weight = torch.rand(11) + 0.5 if weighted else None
    step = selbp.SelectiveBackprop(
        model,
        selector=selbp.TopLoss(normalize="tokens"),
        keep=4,
        loss="causal_lm",
        backward=backward,
        class_weight=weight,
    )
    step(ids, labels).backward()
    logits = model(ids)[:, :-1].transpose(1, 2)
    means = torch.stack([F.cross_entropy(z[None], y[None], weight) for z, y in zip(logits, labels[:, 1:], strict=True)])
    means = means.nan_to_num(-1.0)  # a sequence without targets
    assert sorted(step.report.selection.indices.tolist()) == sorted(means.topk(4).indices.tolist())


def test_by_the_token_needs_a_step():
    stats = selbp.BatchStatistics(*torch.rand(4, 6), *torch.ones(2, 6, dtype=torch.bool))
    assert repr(selbp.TopLoss(normalize="tokens")) == "TopLoss(weights='mean', ridge=0.001, normalize='tokens')"
    with pytest.raises(ValueError, match='normalize="tokens" needs what'):
        selbp.TopLoss(normalize="tokens").select(stats, 2)
    with pytest.raises(ValueError, match="normalize must be one of 'sample', 'tokens'"):
        selbp.TopLoss(normalize="words")
