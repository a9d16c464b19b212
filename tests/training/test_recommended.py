"""The recommended steps train: on the largest losses; with a cut, exact above it, a quarter of the rows below."""

import torch
from torch import nn

import selbp


def test_the_recommended_step_trains_on_the_largest_losses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs, target = torch.randn(64, 12), torch.randint(0, 4, (64,))
    step = selbp.SelectiveBackprop(model, **selbp.recommended())
    step(inputs, target).backward()
    largest = nn.functional.cross_entropy(model(inputs), target, reduction="none").topk(16).indices
    assert sorted(step.report.selection.indices.tolist()) == sorted(largest.tolist())
    chosen = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs[largest]), target[largest]).backward()
    for mine, exact in zip(chosen, model.parameters(), strict=True):
        torch.testing.assert_close(mine, exact.grad)


def test_the_recommended_step_is_exact_above_its_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, target = torch.randn(64, 12), torch.randint(0, 4, (64,))
    step = selbp.SelectiveBackprop(model, **selbp.recommended(cut="2"))
    step(inputs, target).backward()
    chosen = [parameter.grad.clone() for parameter in model.parameters()]
    assert step.report.k == 16
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), target).backward()
    full = [parameter.grad for parameter in model.parameters()]
    for mine, exact in zip(chosen[4:], full[4:], strict=True):
        torch.testing.assert_close(mine, exact)
    # Below it 16 rows stand for 64: near, not equal.
    for mine, exact in zip(chosen[:2], full[:2], strict=True):
        assert 2.0**-6 < float((mine - exact).norm() / exact.norm()) < 1.0
