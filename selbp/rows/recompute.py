"""The two runs of a checkpointed block: on n rows without a graph, and in the backward on the chosen rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selbp._torch import version_of, without_autocast_cache
from selbp.rows.exposed import densify
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import Layout, RowSet
from selbp.rows.masks import Recording, Replaying, undisturbed
from selbp.rows.unsupported import refuse_backward
from selbp.rows.wrap import wrap


@contextmanager
def _as_in_forward(device: str, autocast: tuple[bool, torch.dtype]) -> Iterator[None]:
    """Record a graph inside, under the forward's autocast."""
    with torch.enable_grad(), torch.autocast(device, enabled=autocast[0], dtype=autocast[1]):
        yield


@contextmanager
def _announced(layout: Layout | None) -> Iterator[None]:
    """Tell the selection's observers that k rows are recomputed inside: operators meet plain tensors there."""
    if layout is None:
        yield
        return
    rows = layout.rows
    for observer in rows.observers:
        observer.recompute_begins(rows.n, rows.k)
    try:
        yield
    finally:
        for observer in rows.observers:
            observer.recompute_ends()


class Checkpoint(torch.autograd.Function):
    """``module(*inputs)``, whose activations are not kept. Its parameters stand among the arguments, for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        names: list[str],  # of the parameters
        sampled: list[bool],  # whether an input has the samples in dim 0; else all samples share it
        *tensors: Tensor,  # the inputs, then the parameters
    ) -> Any:
        """Run the module on n rows, and keep the inputs and the masks of its dropout."""
        count = len(sampled)
        inputs = tensors[:count]
        ctx.module, ctx.names, ctx.sampled = module, names, sampled
        ctx.save_for_backward(*tensors)
        device = inputs[0].device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        versions = [version_of(x) for x in inputs]

        def run() -> Any:
            out = module(*inputs)
            _refuse_edits(inputs, versions)
            return out

        recording = Recording(inputs[0].shape[0], tensors)
        with without_autocast_cache():
            out = undisturbed(recording, [*module.buffers()], run)
        if not isinstance(out, Tensor):
            raise TypeError(f"a checkpointed block must return a Tensor, got {type(out).__name__}")
        ctx.masks = recording.masks
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Run the module again, with a graph, on the rows of the gradient; without a selection on all n."""
        refuse_backward()
        sampled, count = ctx.sampled, len(ctx.sampled)
        inputs, parameters = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        n, layout, rows = inputs[0].shape[0], None, None
        if isinstance(gradient, RowGradient) and gradient._layout is gradient._rows.layout(0) and gradient._rows.n == n:
            layout, rows, gradient = gradient._layout, gradient._rows, gradient._data
            if rows.k == n and ctx.masks:
                rows, gradient = _one_more(rows, gradient)
            taken = rows.layout(0)
            inputs = [taken.take(x, 0) if own else x for x, own in zip(inputs, sampled, strict=True)]
        else:
            gradient = densify(gradient)
        needs = ctx.needs_input_grad[3:]
        leaves = [t.detach().requires_grad_(wants) for t, wants in zip((*inputs, *parameters), needs, strict=True)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        named = dict(zip(ctx.names, leaves[count:], strict=True))
        with _announced(layout):
            with _as_in_forward(gradient.device.type, ctx.autocast):
                out = undisturbed(
                    Replaying(ctx.masks, rows, leaves),
                    [*ctx.module.buffers()],
                    lambda: torch.func.functional_call(ctx.module, named, tuple(leaves[:count])),
                )
            gradients = iter(torch.autograd.grad(out, wanted, gradient, allow_unused=True))
        results: list[Tensor | None] = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
        if layout is not None:
            for i, own in enumerate(sampled):
                result = results[i]
                if result is not None and own:
                    results[i] = wrap(result[: layout.rows.k].resolve_conj().resolve_neg(), layout)
        return None, None, None, *results


def _refuse_edits(inputs: tuple[Tensor, ...], versions: list[int]) -> None:
    """Raise ValueError where an input has been written to since ``versions``.

    A second run would edit it again. What the caller computes from it later would not see the block's gradient.
    """
    for i, (x, version) in enumerate(zip(inputs, versions, strict=True)):
        if version_of(x) != version:
            raise ValueError(
                f"inputs[{i}] must not be edited in place by a checkpointed block, whose second run would edit it "
                "again: pass inplace=False to the layer that does, or let the block edit a copy"
            )


def _one_more(rows: RowSet, gradient: Tensor) -> tuple[RowSet, Tensor]:
    """Return n rows and the first of them again, with a zero gradient.

    The second run tells the samples' dim of a mask by its size, which is n in the first run and must be another now.
    """
    indices = torch.cat([rows.indices, rows.indices[:1]])
    more = RowSet(indices, rows.n, any_valid=rows.any_valid, observers=())
    return more, torch.cat([gradient, gradient.new_zeros((1, *gradient.shape[1:]))])
