"""``checkpoint``: a block whose activations are not kept. The backward recomputes the k chosen rows, not all n.

Ordinary checkpointing recomputes n rows, and a row selection then throws most of them away. Here the block's input is
cut to the rows of the gradient that arrives. Only those rows run forward again, with the dropout masks that the first
forward drew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from selbp._checks import shown
from selbp.rows.exposed import densify
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import Layout
from selbp.rows.unsupported import refuse_backward
from selbp.rows.wrap import wrap

_DROPOUTS = {torch.nn.functional.dropout, torch.dropout, torch.nn.functional.dropout1d}
_CHANNEL_DROPOUTS = {torch.nn.functional.dropout2d, torch.nn.functional.dropout3d, torch.feature_dropout}


class _Masks(TorchFunctionMode):
    """Record the dropout masks of a forward, one byte per entry, or replay the chosen rows of recorded masks."""

    def __init__(self, n: int, masks: list[Tensor] | None = None, index: Tensor | None = None) -> None:
        super().__init__()
        self.n, self.index, self.replaying = n, index, masks is not None
        self.masks: list[Tensor] = [] if masks is None else masks
        self._next = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS or func in _CHANNEL_DROPOUTS:
            return self._drop(func, *args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and _attention_drops(args, kwargs):
            raise NotImplementedError("selbp.checkpoint: attention with dropout_p > 0 draws a mask that cannot be kept")
        return func(*args, **kwargs)

    def _drop(
        self, func: Any, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, **_: Any
    ) -> Tensor:
        if "train" in _:
            training = _["train"]
        if not training or p == 0.0:
            return x
        if self.replaying:
            mask = self.masks[self._next]
            self._next += 1
            if self.index is not None:
                dim = mask_dim(mask, self.n)
                mask = mask.index_select(dim, self.index)
        else:
            shape = list(x.shape)
            if func in _CHANNEL_DROPOUTS:
                shape[2:] = [1] * (len(shape) - 2)
            mask = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - p)
            mask_dim(mask, self.n)
            self.masks.append(mask)
        return x * mask * (1.0 / (1.0 - p) if p < 1.0 else 0.0)


def mask_dim(mask: Tensor, n: int) -> int:
    """Return the samples' dim of a dropout mask: dim 0. Raises NotImplementedError if dim 0 is not n."""
    if mask.shape[0] != n:
        raise NotImplementedError(
            f"selbp.checkpoint: dropout of a tensor {tuple(mask.shape)} whose first dim is not the {n} samples"
        )
    return 0


def _attention_drops(args: Any, kwargs: Any) -> bool:
    p = kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
    return bool(p)


@contextmanager
def _as_in_forward(device: str, autocast: tuple[bool, torch.dtype], masks: _Masks) -> Iterator[None]:
    """Record a graph inside, under the forward's autocast and its dropout masks."""
    with torch.enable_grad(), torch.autocast(device, enabled=autocast[0], dtype=autocast[1]), masks:
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


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: nn.Module, names: list[str], count: int, *tensors: Tensor) -> Any:
        inputs = tensors[:count]
        ctx.module, ctx.names, ctx.count = module, names, count
        ctx.save_for_backward(*tensors)
        device = inputs[0].device.type
        ctx.autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        masks = _Masks(inputs[0].shape[0])
        with masks:
            out = module(*inputs)
        if not isinstance(out, Tensor):
            raise TypeError(f"a checkpointed block must return a Tensor, got {type(out).__name__}")
        ctx.masks = masks.masks
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        refuse_backward()
        inputs, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        n, layout, index = inputs[0].shape[0], None, None
        if isinstance(gradient, RowGradient) and gradient._layout is gradient._rows.layout(0) and gradient._rows.n == n:
            layout, index = gradient._layout, gradient._rows.on(gradient.device)
            inputs = tuple(_rows_of(x, layout, n) for x in inputs)
            gradient = gradient._data
        else:
            gradient = densify(gradient)
        needs = ctx.needs_input_grad[3:]
        leaves = [t.detach().requires_grad_(wants) for t, wants in zip((*inputs, *parameters), needs, strict=True)]
        masks = _Masks(n, ctx.masks, index)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        with _announced(layout):
            with _as_in_forward(gradient.device.type, ctx.autocast, masks):
                out = torch.func.functional_call(
                    ctx.module, dict(zip(ctx.names, leaves[ctx.count :], strict=True)), tuple(leaves[: ctx.count])
                )
            gradients = iter(torch.autograd.grad(out, wanted, gradient, allow_unused=True))
        results: list[Tensor | None] = [next(gradients) if leaf.requires_grad else None for leaf in leaves]
        if layout is not None:
            for i, x in enumerate(ctx.saved_tensors[: ctx.count]):
                result = results[i]
                if result is not None and x.shape[0] == n:
                    results[i] = wrap(result.resolve_conj().resolve_neg(), layout)
        return None, None, None, *results


def _rows_of(x: Tensor, layout: Layout, n: int) -> Tensor:
    """Return the rows of an input with n samples in dim 0; any other input as it is."""
    return layout.take(x, 0) if x.dim() and x.shape[0] == n else x


def checkpoint(module: nn.Module, *inputs: Tensor) -> Tensor:
    """Run ``module(*inputs)`` without keeping its activations. The backward runs it again on the rows with a gradient.

    Below a row selection or a cut, only the k chosen rows are recomputed. Without one, all n rows are, as in
    ``torch.utils.checkpoint``. The dropout masks of the first forward are kept, one byte per entry, and replayed.

    Parameters
    ----------
    module : nn.Module
        Must treat samples independently, and return one tensor with the samples in dim 0.
    *inputs : Tensor
        The first is (n, ...). An input whose dim 0 is not n is shared by all samples. Of any dtype.

    Returns
    -------
    Tensor
        The module's output.

    Raises
    ------
    TypeError
        If ``module`` is not a module, an input is not a tensor, or the output is not one tensor.
    ValueError
        If the module contains BatchNorm in training mode: its statistics couple the samples, and a second forward would
        count them again.
    NotImplementedError
        For attention with dropout, or dropout of a tensor without the samples in dim 0.

    See Also
    --------
    selbp.select : selects the rows that the backward runs on.

    Examples
    --------
    >>> import torch, selbp
    >>> block = torch.nn.Linear(3, 3, bias=False)
    >>> losses = selbp.checkpoint(block, torch.ones(4, 3)).sum(1)  # (4,)
    >>> selbp.select(losses, torch.tensor([0, 2])).sum().backward()  # recomputes two rows
    >>> block.weight.grad[0]
    tensor([2., 2., 2.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"inputs must be tensors, the first with the samples in dim 0, got {shown(inputs)}")
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(
                "a checkpointed block must not contain BatchNorm in training mode: its statistics couple rows"
            )
    named = list(module.named_parameters())
    if not torch.is_grad_enabled():
        out: Tensor = module(*inputs)
        return out
    result: Tensor = _Checkpoint.apply(
        module, [name for name, _ in named], len(inputs), *inputs, *(p for _, p in named)
    )
    return result
