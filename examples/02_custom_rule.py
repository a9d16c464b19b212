"""A selection rule of your own: one sample of each class in turn, the hardest first.

Run as ``python examples/02_custom_rule.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import selbp


@dataclass(frozen=True)
class HardestOfEachClass:
    """k rows, the same number of each class as far as possible: of each the largest losses. Weights 1 / k.

    The step hands over the classes by name: ``step(inputs, target, classes=target)``.
    """

    needs = "loss"  # the least that is read: the losses of all n rows

    @torch.no_grad()
    def select(
        self, stats: selbp.BatchStatistics, k: int, *, proxies: Any = None, extras: Any = None, generator: Any = None
    ) -> selbp.Selection:
        """Sort by (place among the rows of one's class, loss) and take the first k. Nothing waits for a device."""
        loss = torch.where(stats.valid, stats.loss, -torch.inf)
        same = extras["classes"][:, None] == extras["classes"]  # (n, n)
        place = (same & (loss[None, :] > loss[:, None])).sum(1)  # how many of the class are harder
        by_loss = loss.argsort(descending=True)
        indices = by_loss[place[by_loss].argsort(stable=True)][:k]
        return selbp.Selection(indices, torch.where(stats.valid[indices], 1.0 / k, 0.0))

    def state_dict(self) -> dict[str, Any]:
        """An empty state: the rule remembers nothing."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Nothing to take over."""


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
