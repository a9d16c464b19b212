"""Bytes of the tensors that are alive during a step: exact, on any machine and any kernel."""

import functools

import pytest
import torch
from torch import Tensor, nn

import selbp
from selbp.training.measured import live_peak
from selbp_study.row_models import TIMED

N = {"MLP": 512, "CNN": 16, "ResNet-GN": 16, "ViT": 16, "GPT": 8}


class Kept(nn.Module):
    """A block, or all up to the losses, under ``selbp.checkpoint``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        return selbp.checkpoint(self.block, *inputs)


class Losses(nn.Module):
    def __init__(self, model: nn.Module, losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.losses(self.model(x), y)


def peak(name: str, strategy: str, segments: str = "") -> int:
    torch.manual_seed(0)
    task, n = TIMED[name], N[name]
    model = task.build()
    if segments == "blocks":
        model.blocks = nn.Sequential(*map(Kept, model.blocks))
    forward: nn.Module = Losses(model, task.losses)
    if segments == "all":
        forward = Kept(forward)
    x, y = task.batch(n)
    chosen = torch.randperm(n)[: n // 4]

    def step() -> None:
        if strategy == "recompute":
            with torch.no_grad():
                forward(x, y)
            forward(x[chosen], y[chosen]).mean().backward()
        else:
            losses = forward(x, y)
            (losses if strategy == "full" else selbp.select(losses, chosen)).mean().backward()

    return live_peak(step)


@pytest.mark.parametrize("name", TIMED)
def test_rows_hold_no_more_than_the_full_step(name: str) -> None:
    assert peak(name, "rows") <= peak(name, "full")


def test_checkpointed_blocks_hold_about_what_a_second_forward_holds() -> None:
    again = peak("ViT", "recompute")
    assert peak("ViT", "rows", "blocks") <= 1.05 * again < 0.4 * peak("ViT", "full")
    # What is outside the segments stays for n rows: GPT's logits and their softmax, unless they are in it as well.
    again = peak("GPT", "recompute")
    assert peak("GPT", "rows", "blocks") < 0.5 * peak("GPT", "full")
    assert peak("GPT", "rows", "all") <= 1.05 * again < 0.4 * peak("GPT", "full")


@pytest.mark.parametrize("name", ["CNN", "ViT"])
def test_copies_that_are_kept_would_be_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test can fail: a backward that remembers every copy holds more than the full step."""
    monkeypatch.setattr("selbp.rows.layout.REMEMBERED", 10**6)
    take = selbp.rows.layout.Slices.take
    held = []

    def hold(self, tensor, layout, dim):
        held.append(tensor)  # and the n rows that they were cut from
        return take(self, tensor, layout, dim)

    monkeypatch.setattr("selbp.rows.layout.Slices.take", functools.wraps(take)(hold))
    assert peak(name, "rows") > peak(name, "full")
