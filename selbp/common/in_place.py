"""What a later in-place operator must not change: a value that is read after it, and where a gradient is read.

``nn.ReLU(inplace=True)``, ``x += residual`` and ``logits.masked_fill_(...)`` write into what a hook has seen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from selbp._torch import version_of
from selbp.common.batch import Batch
from selbp.common.samples import map_tensors


class Kept:
    """The value that ``tensor`` has now, whatever is written into it later.

    Nothing is copied unless somebody writes: the copy shares the memory until then, where torch can do that.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._alias = tensor.detach()
        self._version = version_of(self._alias)
        self._copy: Tensor | None = _copy(self._alias)

    def take(self) -> Tensor:
        """The value. Raises RuntimeError where a write came after the value was taken before."""
        if version_of(self._alias) == self._version:
            self._copy = None  # the memory's only owner again: a kernel that gets its address copies nothing
            return self._alias
        if self._copy is None:
            raise RuntimeError("an activation was overwritten in place after a backward had read it")
        return self._copy


def _copy(tensor: Tensor) -> Tensor:
    if tensor.is_cuda and torch.cuda.current_stream(tensor.device) != torch.cuda.default_stream(tensor.device):
        return tensor.clone()  # a lazy copy is made on the default stream, which waits for no other
    try:
        return torch._lazy_clone(tensor)
    except (AttributeError, RuntimeError, NotImplementedError):  # no such function, or memory of another kind
        return tensor.clone()


class Untouched:
    """Calls a model that may edit its inputs in place, such that they can be used again.

    The first call copies them, and finds out; later ones copy where the model does.
    """

    def __init__(self) -> None:
        self._edits: bool | None = None  # None: not known yet

    def feed(self, batch: Batch, model: nn.Module) -> Any:
        """``batch.feed(model)``. Raises RuntimeError where the model has begun to edit its inputs."""
        if self._edits is not False:
            copies = [map_tensors(part, Tensor.clone) for part in (batch.inputs, batch.held)]
            batch = replace(batch, inputs=copies[0], held=copies[1])
        before = _versions((batch.inputs, batch.held))
        output = batch.feed(model)
        if edited := _versions((batch.inputs, batch.held)) != before:
            if self._edits is False:
                raise RuntimeError(
                    "the model edits its inputs in place, which it did not in the first step: the rows that run again "
                    'would be edited twice. Use backward="rows", or let the model edit a copy'
                )
        self._edits = bool(self._edits) or edited
        return output


def _versions(inputs: Any) -> list[int]:
    found: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(version_of(tensor))
        return tensor

    map_tensors(inputs, note)
    return found


class _Alias(torch.autograd.Function):
    """The identity, in the same memory. The result is no view, as the result of an ordinary operator is not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return gradient


class _Source(torch.autograd.Function):
    """``tensor`` as a result that wants a gradient and hands none on."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def hookable(tensor: Tensor) -> Tensor:
    """``tensor``, or where it is a view its alias: hooks and edges see the gradient before a later in-place edit.

    An edit of a view becomes an edit of its base, and the gradient then passes the view's own node by. The output of a
    linear layer on (n, T, d) is a view.
    """
    if not (tensor.requires_grad and tensor._is_view()):
        return tensor
    out: Tensor = _Alias.apply(tensor)
    return out


def source(tensor: Tensor) -> Tensor:
    """``tensor`` cut off from its graph, requiring a gradient; unlike a leaf it may be edited in place."""
    anchor = torch.empty((), dtype=torch.float32, device=tensor.device, requires_grad=True)
    with torch.enable_grad():
        out: Tensor = _Source.apply(anchor, tensor.detach())
    return out


def edge_of(tensor: Tensor) -> GradientEdge | None:
    """Where the gradient of ``tensor`` as it is now can be read; None where it wants none."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None
