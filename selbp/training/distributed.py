"""Selection under data parallelism: what crosses the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, distributed, nn


class _Averaging:
    """Averages a tensor over the ranks of ``group``, torch's default one for None, in place."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        distributed.all_reduce(x, group=self._group)
        return x.div_(distributed.get_world_size(self._group))

    def __getstate__(self) -> dict[str, Any]:
        """The default group, which every process has. Raises TypeError for another, which is this process's own."""
        if self._group not in (None, distributed.group.WORLD):
            raise TypeError('target="global" over a process group of its own does not pickle: build the step anew')
        return {"_group": None}


def averaging(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function that averages a tensor over the ranks of ``model``'s process group, in place."""
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError('target="global" needs torch.distributed to be initialised')
    return _Averaging(model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None)
