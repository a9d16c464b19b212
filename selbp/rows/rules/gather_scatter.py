"""Rules for the backwards of gathers: ``gradient.new_zeros(size)``, then a write at indices.

``new_zeros`` does not say where the samples will be. ``Zeros`` waits for the write, whose source has a layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.engine import receives_copy
from selbp.rows.gradient import RowGradient, Zeros
from selbp.rows.layout import Layout
from selbp.rows.registry import ZERO_RULES, overloads, require, rule, zero_rule
from selbp.rows.wrap import wrap, wrap_zeros

aten = torch.ops.aten


@rule("new_zeros")
def new_zeros(func: Any, gradient: RowGradient, size: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> Any:
    """Always."""
    return wrap_zeros(gradient, list(size), dtype or gradient.dtype, device or gradient.device)


@rule("new_empty", "new_empty_strided", "empty_like", "new_full", "new_ones", "full_like", "ones_like")
def unrelated(func: Any, gradient: RowGradient, *args: Any, **kwargs: Any) -> Any:
    """Always. The result is an ordinary tensor of n rows, unless the engine copies the gradient into it."""
    same_shape = func is aten.new_empty_strided.default and tuple(args[0]) == tuple(gradient.shape)
    if same_shape and receives_copy(gradient._rows.task):
        return wrap_zeros(gradient, list(args[0]), gradient.dtype, gradient.device, list(args[1]))
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs.setdefault("dtype", gradient.dtype)
    kwargs.setdefault("device", gradient.device)
    kwargs.pop("pin_memory", None)
    return func(torch.empty(tuple(gradient.shape), dtype=gradient.dtype, device="meta"), *args, **kwargs)


@zero_rule("scatter_add", "scatter.src")
def scatter(func: Any, zeros: Any, dim: int, index: Any, source: Any) -> Any:
    """Not along the samples: each row is scattered within itself."""
    require(isinstance(zeros, Zeros) and isinstance(source, RowGradient), "the source is dense")
    layout = source._layout
    dim %= zeros.dim()
    require(not isinstance(index, (RowGradient, Zeros)) and dim != layout.dim, "scatters the samples")
    return wrap(func(zeros.rows_of(layout), dim, layout.take(index), source._data), layout)


@zero_rule("index_add")
def index_add_within(func: Any, zeros: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    """Not along the samples."""
    require(isinstance(zeros, Zeros) and isinstance(source, RowGradient), "the source is dense")
    layout = source._layout
    dim %= zeros.dim()
    require(not isinstance(index, Zeros) and dim != layout.dim, "adds up samples")
    return wrap(func(zeros.rows_of(layout), dim, index, source._data, alpha=alpha), layout)


@zero_rule("scatter_add_", "scatter_.src", "index_add_", "index_put_")
def write_in_place(func: Any, zeros: Any, *args: Any, **kwargs: Any) -> Any:
    """As the out-of-place form. The zeros become the gradient."""
    name = f"{func._overloadpacket.__name__[:-1]}.{func._overloadname}".removesuffix(".default")
    (other,) = overloads(name)
    out = ZERO_RULES[other](other, zeros, *args, **kwargs)
    zeros._data, zeros._layout = out._data, out._layout
    zeros.__class__ = RowGradient
    return zeros


@zero_rule("add.Tensor")
def add(func: Any, first: Any, second: Any, *, alpha: Any = 1) -> Any:
    """Zero plus a gradient of the same shape."""
    gradient = second if isinstance(first, Zeros) else first
    require(isinstance(gradient, RowGradient) and alpha == 1, "neither summand is a gradient")
    require(first.shape == second.shape and first.dtype == second.dtype, "the sum broadcasts")
    return wrap(gradient._data.clone(), gradient._layout)


@zero_rule("index_put", "_unsafe_index_put")
def index_put(func: Any, zeros: Any, indices: Any, source: Any, accumulate: bool = False) -> Any:
    """``x[:, i]`` and the like: no index tensor touches the samples in dim 0."""
    require(isinstance(zeros, Zeros) and isinstance(source, RowGradient), "the source is dense")
    layout = source._layout
    require(layout.dim == 0 and layout.pre == layout.post == 1 and indices[0] is None, "the index picks samples")
    # With no index in dim 0 the result's dim 0 is the source's, unless indices apart from each other move in front.
    used = [axis for axis, index in enumerate(indices) if index is not None]
    require(used == list(range(used[0], used[-1] + 1)), "indices apart from each other come in front")
    return wrap(func(zeros.rows_of(layout), indices, source._data, accumulate), layout)


@zero_rule("select_scatter", "slice_scatter")
def write_view(func: Any, zeros: Any, source: Any, *args: Any) -> Any:
    """A view of the zeros that keeps the samples whole."""
    require(isinstance(zeros, Zeros) and isinstance(source, RowGradient), "the source is dense")
    layout = source._layout
    dim = (args[0] if args else 0) % zeros.dim()
    if func is aten.select_scatter.default:
        layout = layout.at(layout.dim + (dim <= layout.dim))
    require(layout.dim != dim, "a part of the samples")
    return wrap(func(zeros.rows_of(layout), source._data, *args), layout)


def _over_samples(layout: Layout, shape: Any, indices: list[Any]) -> list[Tensor]:
    """Return the chosen rows of index tensors that lead the target and span the samples."""
    used = [index for index in indices if index is not None]
    require(len(used) == len(indices) and not any(isinstance(i, RowGradient) for i in used), "an index is missing")
    # A mask says by its places where the rows go: rows of it would be other places.
    require(all(index.dtype not in (torch.bool, torch.uint8) for index in used), "an index is a mask")
    ndim = max(index.dim() for index in used)
    require(layout.dim < ndim, "the samples are not indexed")
    return [layout.take(index.expand(shape[:ndim])) for index in used]


@rule("index_put", "_unsafe_index_put", when="A sum over the samples into a dense tensor: table[tokens]'s backward.")
def index_sum(func: Any, target: Any, indices: Any, source: Any, accumulate: bool = False) -> Any:
    """``zeros[V, d].index_put([tokens], gradient, accumulate=True)`` returns an ordinary tensor."""
    require(isinstance(source, RowGradient) and not isinstance(target, RowGradient) and accumulate, "not a sum of rows")
    return func(target, _over_samples(source._layout, source.shape, list(indices)), source._data, True)


@rule("gather")
def gather(func: Any, gradient: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Any:
    """Not along the samples."""
    require(isinstance(gradient, RowGradient) and not isinstance(index, RowGradient), "the index is a gradient")
    layout = gradient._layout
    require(dim % gradient.dim() != layout.dim, "gathers samples")
    return wrap(func(gradient._data, dim, layout.take(index), sparse_grad=sparse_grad), layout)


@rule("index_add")
def index_add(func: Any, target: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1) -> Any:
    """Summed over the samples into a dense tensor."""
    require(isinstance(source, RowGradient) and not isinstance(target, RowGradient), "the target is a gradient")
    layout = source._layout
    require(layout.dim == dim % source.dim(), "not along the samples")
    return func(target, dim, layout.take(index, 0), source._data, alpha=alpha)
