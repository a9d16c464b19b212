"""Selection under data parallelism: what crosses the ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, distributed, nn


def averaging(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that averages a tensor over the ranks of ``model``'s process group, in place."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError('target="global" needs torch.distributed to be initialised')
    group = model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None

    def average(x: Tensor) -> Tensor:
        x = x.contiguous()
        distributed.all_reduce(x, group=group)
        return x.div_(distributed.get_world_size(group))

    return average
