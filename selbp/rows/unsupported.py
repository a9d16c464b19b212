"""Refuse what a row selection does not support, at the call or at the start of the backward, with a clear error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selbp.rows.engine import nodes_of

FENCE = "put selbp.fence(x) around the tensor x whose gradient this is: it gets an ordinary one"
_INSTEAD = 'use backward="recompute" there'


def refuse_backward() -> None:
    """Raise NotImplementedError if the backward itself is to be differentiated or traced."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "selbp: create_graph=True (a gradient of the gradient) is not supported through a row selection; "
            + _INSTEAD
        )
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # enabled only if something has imported it
    if compiled is not None and getattr(compiled, "compiled_autograd_enabled", False):
        raise NotImplementedError("selbp: compiled autograd is not supported through a row selection; " + _INSTEAD)


def refuse_forward(tensors: Sequence[Tensor]) -> None:
    """Raise NotImplementedError if the forward ran under a transform, or sharded: its gradients are not plain."""
    for tensor in tensors:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise NotImplementedError(
                "selbp: torch.func transforms (grad, vjp, vmap) are not supported through a row selection; " + _INSTEAD
            )
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError("selbp: DTensor losses (tensor parallelism) are not supported; " + _INSTEAD)
    if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            _refuse_sharded(tensor)


def _refuse_sharded(tensor: Tensor) -> None:
    """Raise NotImplementedError if FSDP is in the graph: its post-backward node, or a flat or distributed parameter.

    ``fully_shard`` on a whole model whose input needs no gradient leaves no such mark. Its gradients are exact (a test
    compares them in two processes). Modules elsewhere in the process do not matter.
    """
    for node in nodes_of([tensor]):
        leaf = getattr(node, "variable", None)
        marks = {type(node).__name__, type(leaf).__name__}
        if marks & {"RegisterPostBackwardFunctionBackward", "FlatParameter", "DTensor"}:
            raise NotImplementedError(f"selbp: FSDP and tensor parallelism are not supported; {_INSTEAD}")


def refuse_subclass(func: Any, kind: type) -> None:
    """Raise NotImplementedError if ``kind``, which operator ``func`` met beside a row gradient, is DTensor."""
    if kind.__name__ == "DTensor":
        raise NotImplementedError(
            f"selbp: {func} met a DTensor in the backward of a row selection. FSDP and tensor parallelism are not "
            'supported there; use backward="recompute".'
        )


def refuse_reshaping(func: Any) -> None:
    """Raise NotImplementedError if ``func`` changes a tensor's own shape or storage: the outer shape cannot change."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"selbp: {func} of a row gradient would change its shape or memory in place; {FENCE}")
