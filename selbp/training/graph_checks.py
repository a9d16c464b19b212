"""What :func:`selbp.cuda_graph` refuses: steps in which something is decided or read in Python each time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from selbp.common.distributed import parallel_in
from selbp.training.losses import PerSample
from selbp.training.step import SelectiveBackprop


def check_graph(step: Any, batch: tuple[Any, ...], optimizer: Any) -> None:
    """Raise TypeError or ValueError, with the reason, for what a CUDA graph cannot hold."""
    if not isinstance(step, SelectiveBackprop):
        raise TypeError(f"step must be a selbp.SelectiveBackprop, got {type(step).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    _check_step(step)
    leaves = pytree.tree_leaves(batch)
    others = [type(x).__name__ for x in leaves if not (x is None or isinstance(x, (Tensor, bool, int, float)))]
    if others:
        raise ValueError(f"inputs must hold tensors for a CUDA graph, which reads no list on the host: got {others[0]}")
    devices = {str(x.device) for x in leaves if isinstance(x, Tensor)}
    if len(devices) != 1 or not next(iter(devices)).startswith("cuda"):
        raise ValueError(f"inputs and target must be on one CUDA device for a CUDA graph, got {sorted(devices)}")
    for group in optimizer.param_groups if optimizer is not None else ():
        if group.get("capturable") is False:
            name = type(optimizer).__name__
            raise ValueError(f"optimizer must be made with capturable=True for a CUDA graph, got {name} without it")


def _check_step(step: SelectiveBackprop) -> None:
    """Raise ValueError for a step in which Python takes part each time."""
    schedule, rule = step.schedule, step.selector
    if schedule.every != 1 or schedule.end is not None or schedule.start > step.optimizer_step:
        raise ValueError(f"step must choose at every step from now on for a CUDA graph, got {schedule!r}")
    loss = step._criterion
    if step.table is not None or (isinstance(loss, PerSample) and getattr(loss.function, "reads_table", False)):
        raise ValueError(
            "step must have neither table= nor a loss that reads one for a CUDA graph: the table is read and written "
            "in Python at each step, and a replay runs no Python"
        )
    if step._cut is not None:
        raise ValueError("step must have no cut for a CUDA graph: a choice in the backward is not supported there")
    if step._pooled is not None:
        raise ValueError("step must have neither micro_batch nor scope='global' for a CUDA graph: the host takes part")
    if rule.state_dict() and not getattr(rule, "replays", False):
        raise ValueError(
            f"step's selector must not remember earlier minibatches for a CUDA graph, which would show it the same "
            f"memory at each replay, unless it writes to it in place and says so by replays = True: got {rule!r}"
        )
    if step._scoring == "eval":
        raise ValueError('step must have scoring="same" for a CUDA graph: "eval" saves and restores random states')
    if parallel_in(step.model) is not None or step._reduce is not None:
        raise ValueError("step must train in one process for a CUDA graph: captured collectives are not supported")
