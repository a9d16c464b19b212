"""A plain training loop on a quarter of each minibatch, beside the same loop on all of it.

Run as ``python examples/01_plain_loop.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp


def make_data(n: int = 2048, width: int = 20, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Noisy clusters: (n, width) inputs and (n,) labels."""
    torch.manual_seed(0)
    centers = torch.randn(classes, width)
    labels = torch.randint(0, classes, (n,))
    return centers[labels] + 1.5 * torch.randn(n, width), labels


def make_model() -> nn.Module:
    """A small network; the seed makes both runs start alike."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))


def train(selector: selbp.Selector | None, epochs: int = 3, batch: int = 128) -> float:
    """Train and return the accuracy on all data. ``selector=None`` is the ordinary loop."""
    inputs, labels = make_data()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = None if selector is None else selbp.SelectiveBackprop(model, selector=selector, keep=0.25)
    for epoch in range(epochs):
        for rows in torch.randperm(len(inputs), generator=torch.Generator().manual_seed(epoch)).split(batch):
            if step is None:
                loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            else:
                loss = step(inputs[rows], labels[rows])  # forward on all rows, backward on a quarter
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step is not None:
            report = step.report
            print(f"  epoch {epoch}: loss {report.loss:.3f}, accuracy {report.accuracy:.3f}, k {report.k}")
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def main() -> None:
    """Compare three loops at equal steps. Random takes the least time; see the guide on equal time."""
    for name, selector in (("full", None), ("random", selbp.Random()), ("matching", selbp.GradientMatching())):
        print(name)
        print(f"  accuracy {train(selector):.3f}")


if __name__ == "__main__":
    main()
