"""A head and its loss in one: the logits of a large vocabulary need not be stored, not even for scoring.

Run as ``python examples/04_fused_head.py``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import selbp

VOCABULARY, WIDTH, ROWS, KEPT = 8000, 64, 256, 64


def main() -> None:
    """Loss and gradients as torch's, then a training step on the rows of the greatest loss."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
    head = nn.Linear(WIDTH, VOCABULARY)
    inputs, target = torch.randn(ROWS, WIDTH), torch.randint(0, VOCABULARY, (ROWS,))

    hidden = trunk(inputs)
    fused = selbp.ops.linear_cross_entropy(hidden, head.weight, head.bias, target)  # (n,) losses
    eager = F.cross_entropy(head(hidden), target, reduction="none")  # stores (n, C) logits
    parameters = [*trunk.parameters(), *head.parameters()]
    ours = torch.autograd.grad(fused.mean(), parameters, retain_graph=True)
    theirs = torch.autograd.grad(eager.mean(), parameters)
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative difference to torch, of any gradient: {worst:.1e}")

    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for i in range(5):
        hidden = trunk(inputs)
        stats = selbp.ops.linear_cross_entropy_statistics(hidden, head.weight, head.bias, target)  # no gradient
        chosen = selbp.TopLoss().select(stats, KEPT)
        rows = selbp.select(hidden, chosen.indices)  # in the backward the trunk runs on these rows only
        loss = selbp.ops.linear_cross_entropy(rows, head.weight, head.bias, target[chosen.indices])
        (loss * chosen.weights).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {i}: loss {float(stats.loss.mean()):.3f}, trained on {KEPT} of {ROWS} rows")


if __name__ == "__main__":
    main()
