"""``backward="auto"`` of a model under ``fully_shard``: counted on all its ranks at once, which then decide alike.

A look ahead gathers the weights, so that every rank takes it at the same step. FLOPs decide: the modelled time knows
nothing of what is gathered, and a second forward gathers once more what rows have at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from selbp.common.batch import Batch
from selbp.training.analysis import analyse_batch


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has taken all of ``model``, and nothing else shards it."""
    if not any(kind.__name__ == "FSDPModule" for kind in type(model).__mro__):
        return False
    placements = [p.placements for p in model.parameters() if hasattr(p, "placements")]
    return all(sum(place.is_shard() for place in each) <= 1 for each in placements)


def keeps_gradients_back(model: nn.Module) -> bool:
    """Whether the next backward adds up gradients without reducing them; True where that cannot be told."""
    module: Any
    for module in model.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            if any(group is not None and not getattr(group, "reduce_grads", False) for group in groups):
                return True
    return False


def prefers_rows(
    model: nn.Module, batch: Batch, k: int, losses: Callable[[Any], Tensor], **options: Any
) -> tuple[bool, dict[str, float], list[str]]:
    """Whether rows take fewer FLOPs on every rank; each way's FLOPs over the full step's; operators not on rows.

    Every rank must call at once. Gradients are left as they are.
    """
    votes = 0
    try:
        with _gradients_put_back(model):
            found = analyse_batch(model, batch, k, losses, sharded=True, **options)
        votes = int(found.cost["rows"] < found.cost["recompute"])
    finally:  # a rank that has failed recomputes, and so must the others
        vote = torch.tensor([votes], dtype=torch.int32, device=batch.device)
        mesh: Any = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
        for group in mesh.get_all_groups():
            distributed.all_reduce(vote, distributed.ReduceOp.MIN, group=group)
    return bool(vote), found.cost, list(found.dense)


@contextmanager
def _gradients_put_back(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter has a gradient.

    Raises NotImplementedError where a backward would do more than leave gradients, such as an optimizer's step.
    """
    parameters = list(model.parameters())
    if any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters):
        raise NotImplementedError("selbp: a parameter has a hook that a backward ahead of the step would run")
    saved = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, saved, strict=True):
            p.grad = gradient
