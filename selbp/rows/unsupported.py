"""Refuse what a row selection does not support, at the call or at the start of the backward, with a clear error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FENCE = "put selbp.fence(x) around the tensor x whose gradient this is: it gets an ordinary one"
_INSTEAD = 'use backward="recompute" there, or cut.eval(), with which a cut passes every row on'


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


def transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is inside a transform of ``torch.func``."""
    found: bool = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return found


def refuse_forward(tensors: Sequence[Tensor]) -> None:
    """Raise NotImplementedError if the forward ran under a transform, or gave a DTensor.

    Parameters may be sharded: FSDP and tensor parallelism inside a model hand plain gradients to plain activations.
    """
    for tensor in tensors:
        if transformed(tensor):
            raise NotImplementedError(
                "selbp: torch.func transforms (grad, vjp, vmap) are not supported through a row selection; " + _INSTEAD
            )
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError("selbp: DTensor losses (tensor parallelism) are not supported; " + _INSTEAD)


def refuse_subclass(func: Any, kind: type) -> None:
    """Raise NotImplementedError if ``kind``, which operator ``func`` met beside a row gradient, is DTensor."""
    if kind.__name__ == "DTensor":
        raise NotImplementedError(
            f"selbp: {func} met a DTensor in the backward of a row selection, where activations must be plain "
            'tensors; use backward="recompute".'
        )


def refuse_reshaping(func: Any) -> None:
    """Raise NotImplementedError if ``func`` changes a tensor's own shape or storage: the outer shape cannot change."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"selbp: {func} of a row gradient would change its shape or memory in place; {FENCE}")
