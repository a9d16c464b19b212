"""What a row selection does not support, found at once and said plainly."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_INSTEAD = 'use backward="recompute" there'


def refuse_backward() -> None:
    """Raise where the backward itself is to be differentiated or traced."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "selbp: create_graph=True (a gradient of the gradient) is not supported through a row selection; "
            + _INSTEAD
        )
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")  # on only if somebody has imported it
    if compiled is not None and getattr(compiled, "compiled_autograd_enabled", False):
        raise NotImplementedError("selbp: compiled autograd is not supported through a row selection; " + _INSTEAD)


def refuse_forward(tensors: Sequence[Tensor]) -> None:
    """Raise where the forward ran under a transform or a parallelism whose gradients are not plain tensors.

    Parameters may be sharded: FSDP and tensor parallelism inside the model hand plain gradients to plain activations.
    """
    for tensor in tensors:
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise NotImplementedError(
                "selbp: torch.func transforms (grad, vjp, vmap) are not supported through a row selection; " + _INSTEAD
            )
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError("selbp: DTensor losses (tensor parallelism) are not supported; " + _INSTEAD)
