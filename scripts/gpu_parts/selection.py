"""What each rule costs on a small problem: launches, host time and device time of scoring and choice."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import selbp
from gpu_parts.results import Results
from gpu_parts.timing import launches, times

RULES = {
    "Full": selbp.Full,
    "Random": selbp.Random,
    "TopLoss": selbp.TopLoss,
    "LossRank": selbp.LossRank,
    "LossPercentile": selbp.LossPercentile,
    "TopGradNorm": selbp.TopGradNorm,
    "GradNormImportance": selbp.GradNormImportance,
    "GradientMatching": selbp.GradientMatching,
    "DivBS": selbp.DivBS,
    "CubeSampling": selbp.CubeSampling,
}


def measure(results: Results, name: str, n: int, k: int, n_classes: int, width: int, device: str, repeats: int) -> None:
    """A step of a two-layer network up to its loss, the backward left out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_classes)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    step = selbp.SelectiveBackprop(model, selector=RULES[name](), keep=k, backward="recompute", generator=generator)
    x, y = torch.randn(n, width, device=device), torch.randint(n_classes, (n,), device=device)
    took = times(lambda: step(x, y), device, repeats)
    results.add(f"{name} n={n} k={k} C={n_classes} d={width}", None, **launches(lambda: step(x, y), device), **took)


def run(results: Results, device: str, tiny: bool) -> None:
    """Every rule at two sizes."""
    sizes = [(16, 4, 3, 8)] if tiny else [(128, 32, 10, 64), (1024, 256, 1000, 512)]
    for n, k, n_classes, width in sizes:
        for name in RULES:
            results.row(
                f"{name} {n}", partial(measure, results, name, n, k, n_classes, width, device, 2 if tiny else 20)
            )
