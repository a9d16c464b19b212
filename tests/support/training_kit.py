"""Small models of every kind that a step must understand, and the ordinary step to compare with."""

from __future__ import annotations

import torch
from torch import nn


def mlp():
    """Classifier of 12 features into 5 classes."""
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


def samples(n=24):
    """(n, 12) inputs and (n,) targets for :func:`mlp`."""
    return torch.randn(n, 12), torch.randint(0, 5, (n,))


class TokenModel(nn.Module):
    """Token ids (n, T) to logits (n, T, vocabulary)."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, input_ids):
        return self.head(self.mix(self.embed(input_ids))[0])


def gradients(model, loss):
    """The gradient of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, rtol=2e-5):
    """Equal to rounding: per tensor, relative to its largest entry."""
    assert got.keys() == want.keys()
    for name in want:
        scale = want[name].abs().max().clamp(min=1e-12)
        assert (got[name] - want[name]).abs().max() <= rtol * scale + 1e-9, name


def assert_same_state(got, want):
    """Equal states, bit for bit; NaN equals NaN."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        if isinstance(value, dict):
            assert_same_state(got[name], value)
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(got[name], value, rtol=0, atol=0, equal_nan=True)
        else:
            assert got[name] == value, name
