"""A strategy that keeps the scoring forward's graph gives the gradient that a second forward gives."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp


@pytest.mark.parametrize("head_gradient", ["subset", "full"])
@pytest.mark.parametrize(
    "selector",
    [selbp.Random(), selbp.TopLoss(), selbp.TopGradNorm(), selbp.GradientMatching()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm", "mse", "nll"])
def test_the_same_gradient(selector, head_gradient, loss):
    if loss == "causal_lm":
        model, x = TokenModel(), torch.randint(0, 11, (6, 9))
        y, options = x, {"loss": loss}
    elif loss == "mse":
        model, x, y, options = mlp(), torch.randn(24, 12), torch.randn(24, 5), {"loss": "mse"}
    else:
        model, (x, y), options = mlp(), samples(), {}
        if loss == "nll":
            model = nn.Sequential(model, nn.LogSoftmax(1))
            options = {"loss": lambda output, target: F.nll_loss(output, target, reduction="none")}
    results = []
    for strategy in ("recompute", "rows"):
        torch.manual_seed(4)
        step = selbp.SelectiveBackprop(
            model, selector=selector, keep=0.5, backward=strategy, head_gradient=head_gradient, **options
        )
        results.append(gradients(model, step(x, y)))
        scored = step.report.scored
        assert step.report.backward == (strategy if scored else "recompute")
    assert_same(results[1], results[0])


def test_batch_norm_is_updated_once():
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, backward="rows")
    step(*samples()).backward()
    assert model[1].num_batches_tracked == 1


def test_eval_scoring_needs_a_second_forward():
    with pytest.raises(ValueError, match="scoring=.eval. is for backward=.recompute"):
        selbp.SelectiveBackprop(mlp(), selector=selbp.TopLoss(), keep=0.5, backward="rows", scoring="eval")
