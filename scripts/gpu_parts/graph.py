"""``selbp.cuda_graph``: the parameters that ordinary steps train, to the bit, and the time of both."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

import selbp
from gpu_parts.results import Results
from gpu_parts.timing import times

RULES = {
    "TopLoss": selbp.TopLoss,
    "GradNormImportance": selbp.GradNormImportance,
    "Random": selbp.Random,
    "GradientMatching": selbp.GradientMatching,
}
STEPS = 8


def build(rule: str, backward: str, device: str) -> tuple[selbp.SelectiveBackprop, torch.optim.Optimizer]:
    """A step and its optimizer, the same each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    step = selbp.SelectiveBackprop(model, selector=RULES[rule](), keep=32, backward=backward, generator=generator)
    return step, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def measure(results: Results, rule: str, backward: str, device: str, repeats: int) -> None:
    """Train twice on the same minibatches."""
    (step, optimizer), (other, second) = build(rule, backward, device), build(rule, backward, device)
    batches = [(torch.randn(128, 64, device=device), torch.randint(10, (128,), device=device)) for _ in range(STEPS)]

    def eagerly(x: torch.Tensor, y: torch.Tensor) -> None:
        second.zero_grad()
        other(x, y).backward()
        second.step()

    for x, y in batches:
        eagerly(x, y)
    name = f"{rule} {backward}"
    if device == "cpu":
        try:
            selbp.cuda_graph(step, *batches[0], optimizer=optimizer)
            results.add(name, False, detail="a CPU tensor was not refused")
        except ValueError as error:
            refused = "one CUDA device" in str(error)
            results.add(name, refused, detail=f"refused: {error}", **times(lambda: eagerly(x, y), device, 1))
        return
    graphed = selbp.cuda_graph(step, *batches[0], optimizer=optimizer)
    for x, y in batches:
        graphed(x, y)
    pairs = zip(step.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    wrong = sum(not torch.equal(a, b) for a, b in pairs)
    report = abs(graphed.report.loss - other.report.loss)
    results.add(name, wrong == 0 and report == 0.0, detail=f"{wrong} tensors differ after {STEPS} steps")
    results.add(f"{name}, ordinary", None, **times(lambda: eagerly(x, y), device, repeats))
    results.add(f"{name}, graph", None, **times(lambda: graphed(x, y), device, repeats))


def run(results: Results, device: str, tiny: bool) -> None:
    """Every rule, by a second forward and by rows."""
    for rule in RULES:
        for backward in ("recompute", "rows"):
            results.row(f"graph of {rule} {backward}", partial(measure, results, rule, backward, device, 20))
