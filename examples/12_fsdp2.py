"""Two processes that hold half of the model each (FSDP2), and each train on a chosen quarter of their minibatch.

Run as ``torchrun --nproc-per-node 2 examples/12_fsdp2.py``. It uses gloo, so it needs no GPU.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import selbp


class Block(nn.Module):
    """A residual block: the unit that is gathered before it runs and let go of after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def main() -> None:
    """Some steps; then the weights are put together again, as for a checkpoint."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))

    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = nn.Sequential(nn.Linear(16, 32), Block(32), Block(32), nn.Linear(32, 4))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # after sharding: its state is sharded too
    step = selbp.SelectiveBackprop(  # after sharding as well
        model,
        selector=selbp.GradientMatching(),
        keep=0.25,
        backward="recompute",  # "auto" would look ahead on all ranks; "rows" is exact too
        generator=torch.Generator().manual_seed(rank),  # draws of each rank's own
    )

    data = torch.Generator().manual_seed(100 + rank)  # other samples on every rank
    losses = []
    for _ in range(20):
        inputs = torch.randn(32, 16, generator=data)
        step(inputs, inputs[:, :4].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.report.loss)

    held = sum(p.to_local().numel() for p in model.parameters()) / sum(p.numel() for p in model.parameters())
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    saved = f", a checkpoint of {len(whole)} tensors" if rank == 0 else ""  # rank 0 has them, to torch.save
    print(
        f"rank {rank}: holds {held:.2f} of the weights, chose {step.report.k} of {step.report.n}, "
        f"loss {losses[0]:.2f} to {losses[-1]:.2f}{saved}",
        flush=True,
    )
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0 if losses[-1] < 0.7 * losses[0] else 1)  # past the interpreter's end, see the example of DDP


if __name__ == "__main__":
    main()
