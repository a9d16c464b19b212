"""Losses mean the same in every minibatch, however many targets it has; gradients and the step's loss are scaled."""

import pytest
import torch
from support.training_kit import TokenModel, mlp, samples
from torch.nn import functional as F

import selbp


class Look(selbp.Full):
    """Everything, after keeping the statistics."""

    needs = "statistics"

    def select(self, stats, k, *, proxies=None, extras=None, generator=None):
        object.__setattr__(self, "stats", stats)
        return super().select(stats, k)


def look(model, x, y, **options):
    rule = Look()
    step = selbp.SelectiveBackprop(model, selector=rule, keep=1.0, **options)
    step(x, y)
    return rule.stats, step.report


WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5, 1.5])


@pytest.mark.parametrize("backward", ["recompute", "rows"])
@pytest.mark.parametrize(
    "options", [{}, {"class_weight": WEIGHT}, {"label_smoothing": 0.1, "class_weight": WEIGHT}], ids=len
)
def test_a_sample_keeps_its_loss_when_others_are_ignored(options, backward):
    model = mlp()
    x, y = samples()
    fewer = y.clone()
    fewer[6:] = -100
    for target in (y, fewer):
        stats, report = look(model, x, target, backward=backward, **options)
        names = {"class_weight": "weight", "label_smoothing": "label_smoothing"}
        arguments = {names[name]: value for name, value in options.items()}
        want = F.cross_entropy(model(x), target, reduction="none", **arguments)
        torch.testing.assert_close(stats.loss, want)
        mean = F.cross_entropy(model(x), target, **arguments)
        assert report.loss == pytest.approx(mean.item(), rel=1e-5)
        z = model(x).detach().requires_grad_()
        mean = F.cross_entropy(z, target, **arguments)
        residual = torch.autograd.grad(len(x) * mean, z)[0]
        torch.testing.assert_close(stats.residual_sq, residual.square().sum(1))


def test_a_sequence_has_the_sum_of_its_tokens():
    model, ids = TokenModel(), torch.randint(0, 11, (6, 9))
    for ignored in (0, 5):
        target = ids.clone()
        target[1:, : ignored + 1] = -100
        stats, report = look(model, ids, target, loss="causal_lm")
        z = model(ids)[:, :-1]
        want = F.cross_entropy(z.transpose(1, 2), target[:, 1:], reduction="none").sum(1)
        torch.testing.assert_close(stats.loss, want)
        mean = F.cross_entropy(z.flatten(0, 1), target[:, 1:].flatten())
        assert report.loss == pytest.approx(mean.item(), rel=1e-5)


def test_the_percentile_history_holds_losses_of_one_unit():
    """A minibatch with few targets must not look harder than those before it."""
    model = mlp()
    x, y = samples()
    fewer = y.clone()
    fewer[6:] = -100
    rule = selbp.LossPercentile(history=30)
    step = selbp.SelectiveBackprop(model, selector=rule, keep=0.25)
    step(x, y)
    step(x, fewer)
    loss = F.cross_entropy(model(x), y, reduction="none").double()
    torch.testing.assert_close(rule.state_dict()["losses"], torch.cat([loss, loss[:6]]))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_reducible_loss_subtracts_like_from_like(weight):
    """With the model's own loss as the irreducible one, nothing is left, whatever the minibatch's scale."""
    model = mlp()
    x, y = samples()
    y[12:] = -100
    irreducible = F.cross_entropy(model(x), y, weight=weight, reduction="none").detach()
    irreducible[3] -= 0.01
    step = selbp.SelectiveBackprop(model, selector=selbp.ReducibleLoss(), keep=1, class_weight=weight)
    step(x, y, irreducible_loss=irreducible)
    assert step.report.selection.indices.tolist() == [3]
