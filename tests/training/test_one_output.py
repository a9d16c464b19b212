"""Cross-entropy of one output a sample is 0 whatever the model does: it is refused, and what is no class is not."""

import pytest
import torch
from torch import nn

import selbp

N = 16
RULES = {
    "full": selbp.Full,
    "random": selbp.Random,
    "loss": selbp.TopLoss,
    "norm": selbp.TopGradNorm,
    "matching": selbp.GradientMatching,
}
LOSSES = {
    "plain": "cross_entropy",
    "noise-aware": selbp.NoiseAwareCrossEntropy(0.2),
    "noise-free": selbp.NoiseAwareCrossEntropy(0.0),
    "transition": selbp.NoiseAwareCrossEntropy(torch.eye(2)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("highest", [0, 1])  # of the labels: torch says nothing of 0 alone
def test_one_output_for_classes_is_refused(rule, loss, highest):
    step = selbp.SelectiveBackprop(nn.Linear(4, 1), selector=RULES[rule](), keep=4, loss=LOSSES[loss])
    with pytest.raises(ValueError, match=r'at least 2, got \(\d+, 1\).*two outputs, or pass loss="bce"'):
        step(torch.randn(N, 4), torch.full((N,), highest))


@pytest.mark.parametrize("rule", RULES)
def test_one_output_for_probabilities_is_refused(rule):
    step = selbp.SelectiveBackprop(nn.Linear(4, 1), selector=RULES[rule](), keep=N)
    with pytest.raises(ValueError, match=r"floating target \(16, 1\).*of one class"):
        step(torch.randn(N, 4), torch.rand(N, 1))


def test_the_one_call_refuses_it():
    data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
    auto = selbp.auto_select(nn.Linear(4, 1), data, classes=2, k=8, pool=16, proxy=False)
    x, y = next(iter(torch.utils.data.DataLoader(data, batch_sampler=auto.sampler)))
    with pytest.raises(ValueError, match="and no classes="):
        auto(x, y)
    auto = selbp.auto_select(nn.Linear(4, 1), data, k=8, pool=16, loss="bce")  # what it says
    x, y = next(iter(torch.utils.data.DataLoader(data, batch_sampler=auto.sampler)))
    auto(x, y).backward()


class MultipleChoice(nn.Module):
    """One score for each of the choices, which are the classes."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.body(x).tanh()).squeeze(-1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", ["plain", "noise-aware"])
def test_a_head_of_one_output_may_score_choices(rule, loss):
    step = selbp.SelectiveBackprop(MultipleChoice(), selector=RULES[rule](), keep=4, loss=LOSSES[loss])
    loss = step(torch.randn(N, 5, 4), torch.randint(0, 5, (N,)))
    assert 0.0 < float(loss.detach())
