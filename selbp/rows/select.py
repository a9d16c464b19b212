"""``select`` and ``fence``: where rows enter a backward, and where they leave it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from selbp._checks import shown
from selbp.rows.engine import current_task, when_backward_ends
from selbp.rows.exposed import densify
from selbp.rows.layout import BatchNormPolicy, RowSet
from selbp.rows.unsupported import refuse_backward, refuse_forward
from selbp.rows.wrap import wrap


def as_row_gradient(rows: RowSet, gradient: Tensor) -> Tensor:
    """Return the (k, ...) gradient of the chosen samples as the gradient of all n."""
    if rows.n == 0:
        return gradient.new_zeros((0, *gradient.shape[1:]))
    if rows.n == 1 and rows.any_valid is None:  # no row to leave out
        return gradient.sum(0, keepdim=True)
    if gradient.shape[0] == 0:  # nothing chosen: one row of zeros, which every kernel accepts
        data = gradient.new_zeros((1, *gradient.shape[1:]))
    else:
        data = rows.merge_duplicates(gradient.resolve_conj().resolve_neg())
    when_backward_ends(rows.slices.clear)
    rows.task = current_task()
    return wrap(data, rows.layout(0))


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, indices: Tensor, rows: RowSet) -> Tensor:
        ctx.rows = rows
        ctx.set_materialize_grads(False)  # no gradient stays None, as below an ordinary operator
        return tensor.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        refuse_backward()
        if gradient is None:
            return None, None, None
        return as_row_gradient(ctx.rows, densify(gradient)), None, None


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
    densified: Counter[str] | None = None,
    any_valid: Tensor | None = None,
    dense: Counter[str] | None = None,
    live: Tensor | None = None,
) -> Any:
    """Select rows of per-sample losses. The backward runs on the selected rows only.

    The forward is ``losses.index_select(0, indices)``. In the backward every operator below ``losses`` that has a rule
    runs on the k chosen rows of what the forward saved for n rows. An operator without a rule gets the gradient
    scattered back to n rows. The gradients are those of ``losses[indices]`` either way, to rounding.

    Parameters
    ----------
    losses : Tensor (n, ...) or pytree of such tensors
        Floating or complex, the samples in dim 0. Anything computed sample by sample: losses, logits, hidden states.
        All tensors must have the same n. A loss that is already averaged is refused.
    indices : Tensor (k,) int64
        In [0, n), in any order, k from 0. An index may occur more than once: the gradients of its rows are added. The
        backward has a copy, so that this tensor may be written to before.
    batchnorm : {"exact", "subset"}
        How BatchNorm in training mode runs, whose statistics couple the samples. ``"exact"`` runs it, and everything
        below it, on n rows. ``"subset"`` runs it on the k rows with the statistics of the n, which is an approximation.
    densified : Counter, optional
        Counts the operators that ran on n rows, by name.
    any_valid : Tensor () bool, optional
        Whether any of the rows counts, if only the device knows. If it is False, the incoming gradients must be 0.
        Every operator with a rule then gives 0, even if the forward left NaN.
    dense, live : optional
        The former names of ``densified`` and ``any_valid``.

    Returns
    -------
    Tensor (k, ...) or pytree of such tensors
        The rows in the order of ``indices``, in the dtype of ``losses``.

    Raises
    ------
    TypeError
        If ``indices`` is not an int64 tensor, or an option is given under both of its names.
    ValueError
        If ``indices`` is not (k,), ``losses`` has no tensor with samples, or its tensors disagree about n.
    IndexError
        If ``indices`` lies on a CPU and has an entry outside [0, n).
    NotImplementedError
        For DTensor losses or under a ``torch.func`` transform. In the backward, under ``create_graph=True`` or
        compiled autograd.

    See Also
    --------
    selbp.BackwardCut : chooses the rows inside the backward.
    selbp.checkpoint : recomputes a block for the chosen rows.
    selbp.diagnose : tells which operators run on k rows, and what that saves.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> x = torch.eye(4, 3)
    >>> losses = model(x).squeeze(1)  # (4,)
    >>> selbp.select(losses, torch.tensor([0, 2])).sum().backward()
    >>> model.weight.grad
    tensor([[1., 0., 1.]])
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        raise TypeError(f"indices must be an int64 tensor, got {getattr(indices, 'dtype', type(indices).__name__)}")
    if indices.dim() != 1:
        raise ValueError(f"indices must be (k,), got {tuple(indices.shape)}")
    if not isinstance(batchnorm, str) or batchnorm not in ("exact", "subset"):
        raise ValueError(f'batchnorm must be "exact" or "subset", got {shown(batchnorm)}')
    densified = _renamed("densified", densified, "dense", dense)
    any_valid = _renamed("any_valid", any_valid, "live", live)
    leaves, spec = ([losses], None) if isinstance(losses, Tensor) else pytree.tree_flatten(losses)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(leaf.dim() == 0 for leaf in tensors):
        raise ValueError('losses must hold one entry per sample, got a scalar: compute them with reduction="none"')
    sizes = {leaf.shape[0] for leaf in tensors}
    if len(sizes) > 1:
        raise ValueError(f"losses must agree about the number of samples, got {sorted(sizes)}")
    n = sizes.pop()
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise IndexError(
            f"indices out of range: they must lie in [0, {n}), got {int(indices.min())} to {int(indices.max())}"
        )
    refuse_forward(tensors)
    chosen = indices
    if not indices.numel():  # see `as_row_gradient`: one row stands for none, and that row may hold NaN
        chosen, any_valid = indices.new_zeros(1), torch.zeros((), dtype=torch.bool, device=indices.device)
    rows = RowSet(chosen, n, batchnorm=batchnorm, densified=densified, any_valid=any_valid)
    out: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            out.append(leaf)
        elif leaf.requires_grad:
            out.append(_Select.apply(leaf, indices.to(leaf.device), rows))
        else:
            out.append(leaf.index_select(0, indices.to(leaf.device)))
    return out[0] if spec is None else pytree.tree_unflatten(out, spec)


def _renamed(name: str, value: Any, former: str, former_value: Any) -> Any:
    """Return the value of an option that has a former name. Raises TypeError if both are given."""
    if value is not None and former_value is not None:
        raise TypeError(f"select takes {name} or its former name {former}, got both")
    return former_value if value is None else value


def fence(tensor: Tensor) -> Tensor:
    """Return ``tensor`` unchanged; its gradient is always an ordinary tensor of n rows.

    Use it for code that needs a dense gradient: an input whose ``.grad`` is read through numpy, a hook that calls an
    extension by pointer.

    Parameters
    ----------
    tensor : Tensor
        Of any shape and dtype.

    Returns
    -------
    Tensor
        A view of ``tensor``.

    Raises
    ------
    TypeError
        If ``tensor`` is not a tensor.

    See Also
    --------
    selbp.select : makes the backward run on k rows.

    Examples
    --------
    >>> import torch, selbp
    >>> x = torch.ones(3, 2, requires_grad=True)
    >>> hidden = selbp.fence(2 * x)
    >>> (gradient,) = torch.autograd.grad(selbp.select(2 * hidden, torch.tensor([1])).sum(), x)
    >>> gradient
    tensor([[0., 0.],
            [4., 4.],
            [0., 0.]])
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"fence takes a Tensor, got {shown(tensor)}")
    out: Tensor = _Fence.apply(tensor)
    return out
