"""A selection rule of your own: one sample of each class in turn, the hardest first.

Run as ``python examples/02_custom_rule.py``.
"""

from __future__ import annotations

import torch
from torch import nn

import selbp


class HardestOfEachClass(selbp.BaseSelector):
    """k rows, the same number of each class as far as possible: of each the largest losses. Weights 1 / k.

    The step hands over the classes by name: ``step(inputs, target, classes=target)``.
    """

    needs = "loss"  # the least that is read: the losses of all n rows

    def choose(self, rows: selbp.selectors.Candidates, k: int) -> selbp.Selection:
        """Compare by (place among the rows of one's class, loss). Nothing waits for a device."""
        loss = torch.where(rows.stats.valid, rows.stats.loss, -torch.inf)
        classes = rows.extra("classes")
        harder = (classes[:, None] == classes) & (loss[None, :] > loss[:, None])  # (n, n)
        rank = loss.argsort().argsort() / rows.n  # in [0, 1)
        return rows.pick(rank - harder.sum(1), k)  # the best of each class first, then the second best, ...


def main() -> None:
    """Train on data in which one class is rare."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    step = selbp.SelectiveBackprop(model, selector=HardestOfEachClass(), keep=12)
    centers = torch.randn(3, 10)
    for i in range(40):
        target = torch.multinomial(torch.tensor([0.6, 0.35, 0.05]), 64, replacement=True)
        inputs = centers[target] + torch.randn(64, 10)
        step(inputs, target, classes=target).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i % 10 == 0:
            counts = torch.bincount(target[step.report.selection.indices], minlength=3).tolist()
            print(f"step {i:2d}: loss {step.report.loss:.3f}, chosen of each class {counts}")


if __name__ == "__main__":
    main()
