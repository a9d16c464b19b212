"""Rules of reductions and matrix products, which turn a gradient of n samples into a parameter's gradient.

A sum over the samples is an ordinary tensor. In a product the samples are either a free index or the contracted one. If
they are free, the result has them, and the other factor is used as it is. If they are contracted, the chosen rows of
the other factor are taken.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.registry import require, rule
from selbp.rows.wrap import wrap

aten = torch.ops.aten


@rule("sum.dim_IntList", "sum", "mean.dim", "mean")
def total(func: Any, gradient: RowGradient, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    """Always. A sum over the samples is an ordinary tensor."""
    data, layout = gradient._data, gradient._layout
    if func is aten.sum.dim_IntList and dims == [layout.dim]:
        return data.sum(dims, keepdim, dtype=dtype)
    ndim = data.dim()
    over = [dims] if isinstance(dims, int) else dims if dims else range(ndim)
    over = sorted([dim % ndim for dim in over])
    out = data.sum(over, keepdim, dtype=dtype)
    if func is aten.mean.dim or func is aten.mean.default:
        out = out / prod(gradient.shape[dim] for dim in over)  # the zero rows count too
    if layout.dim in over:
        return out
    return wrap(out, layout if keepdim else layout.at(layout.dim - sum(dim < layout.dim for dim in over)))


@rule("mm")
def matrix_product(func: Any, first: Any, second: Any) -> Any:
    """The samples are an outer dim, or contracted with a dense factor or a gradient laid out alike."""
    if type(first) is RowGradient:
        layout = first._layout
        if type(second) is RowGradient:
            other = second._layout
            require(layout.dim == 1 and other is layout.at(0), "two gradients that are not contracted over the samples")
            return torch.mm(first._data, second._data)
        if layout.dim == 0:
            return wrap(torch.mm(first._data, second), layout)
        return torch.mm(first._data, layout.take(second, 0))
    layout = second._layout
    if layout.dim == 1:
        return wrap(torch.mm(first, second._data), layout)
    return torch.mm(layout.take(first, 1), second._data)


@rule("bmm")
def batched_product(func: Any, first: Any, second: Any) -> Any:
    """The samples are the batch, an outer dim, or contracted with a dense factor."""
    gradient = first if isinstance(first, RowGradient) else second
    layout = gradient._layout
    both = isinstance(first, RowGradient) and isinstance(second, RowGradient)
    if layout.dim == 0:
        require(not both or first._layout is second._layout, "two gradients with their samples in different places")
        rows = [x._data if isinstance(x, RowGradient) else layout.take(x, 0) for x in (first, second)]
        return wrap(func(*rows), layout)
    require(not both, "two gradients that are not batched over the samples")
    if gradient is first:
        if layout.dim == 1:
            return wrap(func(first._data, second), layout)
        return func(first._data, layout.take(second, 1))
    if layout.dim == 2:
        return wrap(func(first, second._data), layout)
    return func(layout.take(first, 2), second._data)


@rule("mv")
def matrix_vector(func: Any, matrix: Any, vector: Any) -> Any:
    """The samples are the matrix's outer dim, or contracted."""
    if isinstance(matrix, RowGradient):
        layout = matrix._layout
        require(not isinstance(vector, RowGradient), "matrix and vector are both gradients")
        if layout.dim == 0:
            return wrap(func(matrix._data, vector), layout)
        return func(matrix._data, layout.take(vector, 0))
    return func(vector._layout.take(matrix, 1), vector._data)


@rule("dot", "vdot")
def dot(func: Any, first: Any, second: Any) -> Any:
    """One factor is dense."""
    gradient, dense = (first, second) if isinstance(first, RowGradient) else (second, first)
    require(not isinstance(dense, RowGradient), "both factors are gradients")
    rows = gradient._layout.take(dense)
    return func(gradient._data, rows) if gradient is first else func(rows, gradient._data)


@rule("embedding_dense_backward")
def embedding(func: Any, gradient: Any, indices: Tensor, n_embeddings: int, padding: int, by_frequency: bool) -> Any:
    """scale_grad_by_freq=False, because frequencies are counted over all samples."""
    require(isinstance(gradient, RowGradient) and not isinstance(indices, RowGradient), "the indices are a gradient")
    layout = gradient._layout
    require(not by_frequency, "scale_grad_by_freq counts over all samples")
    require(layout.dim < indices.dim(), "the samples are the embedding's features")
    return func(gradient._data, layout.take(indices), n_embeddings, padding, False)
