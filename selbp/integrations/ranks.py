"""A state that every process has of its own, in a checkpoint that one process writes for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, distributed
from torch.utils._pytree import tree_map_only

from selbp._checks import shown


def _world() -> tuple[int, int]:
    """The rank of this process, and how many processes there are."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def gathered(state: Any) -> dict[str, Any]:
    """The states of all processes, on the CPU: to be called by all of them at once."""
    _, size = _world()
    if size == 1:
        return {"ranks": [state]}
    state = tree_map_only(Tensor, Tensor.cpu, state)  # else each process would open the devices of all others
    states: list[Any] = [None] * size
    distributed.all_gather_object(states, state)
    return {"ranks": states}


def own(states: Mapping[str, Any]) -> Any:
    """The part of this process in :func:`gathered`. Raises ValueError where there were fewer or more processes then."""
    rank, size = _world()
    ranks = states.get("ranks") if isinstance(states, Mapping) else None
    if not isinstance(ranks, list):
        raise ValueError(f"the state must have the entry 'ranks', got {shown(states)}")
    if len(ranks) != size:
        raise ValueError(f"the state is of {len(ranks)} processes, each with its own memory, and there are {size}")
    return ranks[rank]
