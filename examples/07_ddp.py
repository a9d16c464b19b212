"""Two processes that choose, each from its own minibatch or both from all; DistributedDataParallel averages gradients.

Run as ``torchrun --nproc-per-node 2 examples/07_ddp.py``. It uses gloo, so it needs no GPU.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import selbp


def main() -> None:
    """A few steps; then every rank must hold the same weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same weights everywhere
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Built from the wrapped model: else the gradients would never be averaged.
    options = {"selector": selbp.GradientMatching(), "keep": 0.25}
    steps = {
        "its own, for the mean gradient of both": selbp.SelectiveBackprop(model, target="global", **options),
        "all, as one process would": selbp.SelectiveBackprop(model, scope="global", **options),
    }

    data = torch.Generator().manual_seed(100 + rank)  # other samples on every rank
    for among, step in steps.items():
        for _ in range(5):
            inputs = torch.randn(32, 16, generator=data)
            target = inputs[:, :4].argmax(1)
            step(inputs, target).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"rank {rank}: chose among {among}: {step.report.k} of {step.report.n}", flush=True)

    weight = model.module[0].weight.detach()
    spread = weight.clone()
    dist.broadcast(spread, src=0)
    same = bool(torch.equal(spread, weight))
    print(f"rank {rank}: weights equal to rank 0's: {same}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in std::terminate.
    sys.stdout.flush()
    os._exit(0 if same else 1)


if __name__ == "__main__":
    main()
