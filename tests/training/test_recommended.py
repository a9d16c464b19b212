"""The recommended step trains: exact above the cut, a quarter of the rows below it."""

import torch
from torch import nn

import selbp


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
    # The forward below the cut is rounded to bfloat16 (2^-9): the head's gradient carries that and nothing else.
    for mine, exact in zip(chosen[4:], full[4:], strict=True):
        assert float((mine - exact).norm() / exact.norm()) < 2.0**-6
    # Below it 16 rows stand for 64: near, not equal.
    for mine, exact in zip(chosen[:2], full[:2], strict=True):
        assert 2.0**-6 < float((mine - exact).norm() / exact.norm()) < 1.0
