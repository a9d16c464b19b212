"""Layers with running statistics inside torch's checkpoint: the backward runs them again, which must change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training_kit import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import selbp

EXACT = 1e-12
BLOCKS = {
    "batch norm in the middle": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)],
    "batch norm last": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)],
    "cumulative": lambda: [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)],
    "instance norm": lambda: [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), nn.ReLU()],
}
WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"backward": "recompute"},
    "full head": {"backward": "recompute", "head_gradient": "full"},
    "micro-batches": {"micro_batch": 4},
    "all ranks": {"scope": "global"},
    "below a cut": {"backward": "recompute", "cut": "middle", "selector": selbp.GradientMatching()},
}


class Net(nn.Module):
    """``wrapped``: None, or whether the checkpoint around the block is reentrant."""

    def __init__(self, block: str, wrapped: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.middle, self.head = nn.Sequential(*BLOCKS[block]()), nn.Identity(), nn.Linear(4, 3)
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(x) if self.wrapped is None else checkpoint(self.block, x, use_reentrant=self.wrapped)
        return self.head(torch.relu(self.middle(x)).mean((2, 3)))


def trained(block: str, wrapped: bool | None, way: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = Net(block, wrapped).double()
    step = selbp.SelectiveBackprop(model, **{"selector": selbp.TopLoss(), "keep": 0.5, **WAYS[way]})
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64) + 1
        y = torch.randint(0, 3, (16,), generator=generator)
        x.requires_grad_()  # a reentrant checkpoint has a graph only where an input has one
        step.backward(x, y) if way == "micro-batches" else step(x, y).backward()
    return model, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_changes_neither_gradients_nor_statistics(block: str, reentrant: bool, way: str) -> None:
    (plain, want), (model, got) = trained(block, None, way), trained(block, reentrant, way)
    assert_same(got, want, rtol=EXACT)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=name)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_statistics_are_those_of_the_forward_that_scores(block: str) -> None:
    model, plain = trained(block, False, "recompute")[0], Net(block, None).double()
    generator = torch.Generator().manual_seed(1)
    plain(torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64) + 1)
    torch.randint(0, 3, (16,), generator=generator)
    start = {name: p.detach() for name, p in plain.named_parameters()}
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())  # nothing has been trained
    plain(torch.randn(16, 3, 8, 8, generator=generator, dtype=torch.float64) + 1)
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT, msg=name)


def test_two_steps_with_one_backward_beside_a_plain_forward() -> None:
    model, x = Net("batch norm last", False).double(), torch.randn(2, 16, 3, 8, 8, dtype=torch.float64)
    y, norm = torch.randint(0, 3, (16,)), model.block[1]
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, backward="recompute")
    buffers = [*norm.buffers()]
    ahead = norm(x[0, :, :1].expand(-1, 4, -1, -1).clone().requires_grad_()).square().sum()
    losses = [step(part, y) for part in x]
    before = [buffer.clone() for buffer in buffers]
    sum(losses).backward()
    assert all(map(torch.equal, norm.buffers(), before))
    assert all(a is b for a, b in zip(norm.buffers(), buffers, strict=True))
    ahead.backward()  # its graph has saved the buffers: to put them back is no change
    assert int(norm.num_batches_tracked) == 3


def test_a_backward_that_fails_leaves_nothing_behind() -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("planted")

    class Net(nn.Sequential):
        fails = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = super().forward(x)
            return Failing.apply(x) if self.fails else x

    model = Net(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, backward="recompute")
    own = [*model.buffers()]
    with pytest.raises(ArithmeticError, match="planted"):
        step(torch.randn(12, 6), torch.randint(0, 3, (12,))).backward()
    assert all(a is b for a, b in zip(model.buffers(), own, strict=True))
    model.fails = False
    model(torch.randn(12, 6))
    step(torch.randn(12, 6), torch.randint(0, 3, (12,))).backward()
    assert int(model[1].num_batches_tracked) == 3
