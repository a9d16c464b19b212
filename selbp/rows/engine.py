"""Autograd's graph: the node that is running, and all nodes below a tensor.

What the running node does with a gradient decides whether the gradient may stay k rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Private in torch: without them no node is known to be running, and every backward has the task -1.
_current_node = getattr(torch._C, "_current_autograd_node", lambda: None)
current_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def when_backward_ends(function: Callable[[], None]) -> None:
    """Call ``function`` at the end of the backward that runs now; after an error in it, never."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def becomes_leaf_grad(task: int) -> bool:
    """Return whether the engine is about to store a gradient as ``.grad`` of a parameter or of the user's own leaf.

    ``task`` is the backward in which the gradient's rows entered. Reentrant checkpointing runs a backward within that
    backward and reads ``.grad`` of leaves that it made itself: those are not the user's.
    """
    leaf = getattr(_current_node(), "variable", None)
    if leaf is None:
        return False
    return isinstance(leaf, torch.nn.Parameter) or bool(current_task() == task)


def receives_copy(task: int) -> bool:
    """Return whether the engine makes empty memory in order to copy a gradient into it.

    It does so for a leaf of a checkpoint's own, and before it writes to a part of the gradient.
    """
    node = _current_node()
    if getattr(node, "variable", None) is not None:
        return not becomes_leaf_grad(task)
    return type(node).__name__ == "CopySlices"


def nodes_of(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield every node of the graph that computed ``tensors``, once each."""
    seen: set[Any] = set()
    todo: list[Any] = [tensor.grad_fn for tensor in tensors]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo.extend(following for following, _ in node.next_functions)
