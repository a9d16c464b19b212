"""``select`` and ``fence``: where rows enter a backward, and where they must leave it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from selbp._checks import shown
from selbp.rows.engine import current_task
from selbp.rows.gradient import densify, wrap
from selbp.rows.layout import BatchNormPolicy, RowSet
from selbp.rows.unsupported import refuse_backward, refuse_forward


def enter(rows: RowSet, gradient: Tensor) -> Tensor:
    """The (k, ...) gradient of the chosen samples as the gradient of all n."""
    if rows.n == 0:
        return gradient.new_zeros((0, *gradient.shape[1:]))
    if rows.n == 1 and rows.live is None:  # nothing to leave out
        return gradient.sum(0, keepdim=True)
    if gradient.shape[0] == 0:  # nothing chosen: one row of zeros, which every kernel accepts
        data = gradient.new_zeros((1, *gradient.shape[1:]))
    else:
        data = rows.merged(gradient.resolve_conj().resolve_neg())
    torch.autograd.Variable._execution_engine.queue_callback(rows.slices.clear)
    rows.task = current_task()
    return wrap(data, rows.layout(0))


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, indices: Tensor, rows: RowSet) -> Tensor:
        ctx.rows = rows
        ctx.set_materialize_grads(False)  # no gradient stays none, as below an ordinary operator
        return tensor.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        refuse_backward()
        if gradient is None:
            return None, None, None
        return enter(ctx.rows, densify(gradient)), None, None


class _Fence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        return densify(gradient)


def select(
    losses: Any,
    indices: Tensor,
    *,
    batchnorm: BatchNormPolicy = "exact",
    dense: Counter[str] | None = None,
    live: Tensor | None = None,
) -> Any:
    """Rows ``indices`` of per-sample losses; the backward runs on those rows only.

    In the forward this is ``losses.index_select(0, indices)``. In the backward every operator below ``losses`` that has
    a rule runs on the k chosen rows of what the forward on n rows saved; an operator without one gets the gradient
    scattered back to n rows. The gradients are those of ``losses[indices]`` either way, to rounding.

    Args:
        losses: (n, ...) tensor, or a pytree of such tensors with the same n. Anything computed sample by sample serves:
            losses, logits, hidden states. A scalar that a model has already averaged cannot be selected from.
        indices: (k,) int64, in any order, duplicates allowed (their gradients add up), k = 0 to any.
        batchnorm: BatchNorm in training mode couples the samples. ``"exact"`` runs it, and all below, on n rows;
            ``"subset"`` runs it on the k rows with the statistics of the n (an approximation, see docs/rows.md).
        dense: counts the operators that ran on n rows, by name; for reports.
        live: () bool, whether any of the rows counts, where only the device knows. If it is False, the gradients that
            come in must be 0, and those that go out are 0 whatever the forward left, NaN included, by every rule.

    Returns:
        The (k, ...) rows, in the order of ``indices``.

    Raises:
        TypeError, ValueError: ``indices`` is not a (k,) int64 tensor, or the tensors disagree about n.
        NotImplementedError: under FSDP, tensor parallelism or a functional transform; in the backward, under
            ``create_graph=True`` or compiled autograd.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be (k,), got {tuple(indices.shape)}")
    if not isinstance(batchnorm, str) or batchnorm not in ("exact", "subset"):
        raise ValueError(f'batchnorm must be "exact" or "subset", got {shown(batchnorm)}')
    leaves, spec = ([losses], None) if isinstance(losses, Tensor) else pytree.tree_flatten(losses)
    found = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not found or any(leaf.dim() == 0 for leaf in found):
        raise ValueError('losses must hold one entry per sample, got a scalar: compute them with reduction="none"')
    sizes = {leaf.shape[0] for leaf in found}
    if len(sizes) > 1:
        raise ValueError(f"losses must agree about the number of samples, got {sorted(sizes)}")
    n = found[0].shape[0]
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise IndexError(
            f"indices out of range: they must lie in [0, {n}), got {int(indices.min())} to {int(indices.max())}"
        )
    refuse_forward(found)
    chosen = indices
    if not indices.numel():  # see `enter`; the row that stands for none may hold NaN
        chosen, live = indices.new_zeros(1), torch.zeros((), dtype=torch.bool, device=indices.device)
    rows = RowSet(chosen, sizes.pop(), batchnorm=batchnorm, dense=dense, live=live)
    out: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            out.append(leaf)
        elif leaf.requires_grad:
            out.append(_Select.apply(leaf, indices.to(leaf.device), rows))
        else:
            out.append(leaf.index_select(0, indices.to(leaf.device)))
    return out[0] if spec is None else pytree.tree_unflatten(out, spec)


def fence(tensor: Tensor) -> Tensor:
    """The identity, whose gradient is always an ordinary tensor of n rows.

    For what needs a dense gradient: an input whose ``.grad`` is read through numpy, a hook that calls an extension by
    pointer, a compiled region.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fence takes a Tensor, got {shown(tensor)}")
    out: Tensor = _Fence.apply(tensor)
    return out
