"""Autograd's nodes: which is running, since what it does with a gradient says whether rows may stay; and all below."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from selbp.rows.gradient import Wrapper

_current_node = getattr(torch._C, "_current_autograd_node", lambda: None)
current_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def becomes_a_leafs(gradient: Wrapper) -> bool:
    """Whether the engine is about to store it as ``.grad`` of a parameter or of a leaf of the user's own.

    Reentrant checkpointing runs a backward within the backward, and reads there the ``.grad`` of leaves that it made.
    """
    leaf = getattr(_current_node(), "variable", None)
    if leaf is None:
        return False
    return isinstance(leaf, torch.nn.Parameter) or bool(current_task() == gradient._rows.task)


def copies(gradient: Wrapper) -> bool:
    """Whether empty memory is about to get a copy of it: for a checkpoint's own leaf, or to write to a part of it."""
    node = _current_node()
    if getattr(node, "variable", None) is not None:
        return not becomes_a_leafs(gradient)
    return type(node).__name__ == "CopySlices"


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph that ``tensors`` were computed by, once each."""
    seen: set[Any] = set()
    todo: list[Any] = [tensor.grad_fn for tensor in tensors]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions)
