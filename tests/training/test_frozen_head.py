"""``head_gradient="full"``, and parameters of the head that are frozen after the step was made."""

import pytest
import torch
from support.training_kit import assert_same, mlp, samples
from torch.nn import functional as F

import selbp


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")], ids=" and ".join)
@pytest.mark.parametrize("options", [{"backward": "rows"}, {"backward": "recompute"}, {"micro_batch": 7}], ids=str)
def test_they_stay_frozen(options, frozen):
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), samples()
    x, head = x.double(), model[2]
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, head_gradient="full", **options)
    step.backward(x, y)  # as it was made
    model.zero_grad()
    for name in frozen:
        head.get_parameter(name).requires_grad_(False)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    want = dict(zip(wanted, torch.autograd.grad(F.cross_entropy(model(x), y), list(wanted.values())), strict=True))
    step.backward(x, y)
    assert all(not head.get_parameter(name).requires_grad for name in frozen)
    assert_same({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, want, rtol=1e-11)
    for name in frozen:
        head.get_parameter(name).requires_grad_(True)
    step.backward(x, y)
    assert all(p.grad is not None for p in model.parameters())
