"""Rules of operators that move data: the backwards of views, joins, padding and reordering."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.layout import Layout
from selbp.rows.registry import require, rule
from selbp.rows.rules.views import whole_sets
from selbp.rows.wrap import wrap

aten = torch.ops.aten


@rule("slice_backward")
def narrow_backward(func: Any, gradient: RowGradient, size: Any, dim: int, start: int, end: int, step: int) -> Any:
    """Not along the samples, or only whole sets of n samples."""
    layout, size = gradient._layout, list(size)
    dim %= len(size)
    if dim == layout.dim:
        first, last = whole_sets(layout, start, end, step, size[dim])
        require(
            last - first == layout.pre and size[dim] % (layout.rows.n * layout.post) == 0, "took a part of the samples"
        )
        kept = layout.rows.k * layout.post
        layout = layout.rows.layout(dim, size[dim] // (layout.rows.n * layout.post), layout.post)
        size[dim] = layout.kept
        return wrap(func(gradient._data, size, dim, first * kept, last * kept, 1), layout)
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, dim, start, end, step), layout)


@rule("select_backward")
def select_backward(func: Any, gradient: RowGradient, size: Any, dim: int, index: int) -> Any:
    """Not along the samples."""
    layout, size = gradient._layout, list(size)
    dim %= len(size)
    layout = layout.at(layout.dim + (dim <= layout.dim))
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, dim, index), layout)


@rule("unfold_backward")
def unfold_backward(func: Any, gradient: RowGradient, size: Any, dim: int, length: int, step: int) -> Any:
    """Not along the samples."""
    layout, size = gradient._layout, list(size)
    dim %= len(size)
    require(dim != layout.dim and layout.dim < len(size), "windows over the samples")
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, dim, length, step), layout)


def same_layout(parts: Any) -> tuple[Layout, list[Tensor]]:
    """Return the layout that all ``parts`` share, and their rows. The gradient of an unused part is ordinary zeros."""
    first = next(part for part in parts if isinstance(part, RowGradient))
    layout, rows = first._layout, []
    for part in parts:
        if isinstance(part, RowGradient):
            require(part._layout is layout, "two gradients with their samples in different places")
            rows.append(part._data)
        else:
            zeros = part.dim() == first.dim() and part.device.type == "cpu" and not part.any()
            require(zeros, "a part is dense")
            size = list(part.shape)
            require(size[layout.dim] == layout.full, "a part has its samples elsewhere")
            size[layout.dim] = layout.kept
            rows.append(part.new_zeros(size))
    return layout, rows


@rule("cat")
def concatenate(func: Any, parts: list[Any], dim: int = 0) -> Any:
    """All parts are gradients of the same selection laid out alike, or (on a CPU) zeros."""
    layout, rows = same_layout(parts)
    dim %= parts[0].dim()
    if dim == layout.dim:  # the parts follow each other: (parts, pre, n, post)
        return wrap(func(rows, dim), layout.rows.layout(dim, len(parts) * layout.pre, layout.post))
    return wrap(func(rows, dim), layout)


@rule("stack")
def stack(func: Any, parts: list[Any], dim: int = 0) -> Any:
    """All parts are gradients of the same selection laid out alike, or (on a CPU) zeros."""
    layout, rows = same_layout(parts)
    dim %= parts[0].dim() + 1
    return wrap(func(rows, dim), layout.at(layout.dim + (dim <= layout.dim)))


@rule("constant_pad_nd")
def pad(func: Any, gradient: RowGradient, padding: list[int], value: float = 0) -> Any:
    """Filled with 0, and not along the samples."""
    behind = 2 * (gradient.dim() - 1 - gradient._layout.dim)
    require(value == 0 and not any(padding[behind : behind + 2]), "pads the samples, or not with 0")
    return wrap(func(gradient._data, padding, value), gradient._layout)


@rule("flip", "roll", "cumsum")
def along(func: Any, gradient: RowGradient, amount: Any, dims: Any = None, **kwargs: Any) -> Any:
    """Not along the samples."""
    over = dims if func is aten.roll.default else amount
    over = [over] if isinstance(over, int) else over
    require(bool(over) and all(dim % gradient.dim() != gradient._layout.dim for dim in over), "runs along the samples")
    args = (amount,) if dims is None else (amount, dims)
    return wrap(func(gradient._data, *args, **kwargs), gradient._layout)


@rule("_fft_c2c", "_fft_r2c", "_fft_c2r")
def fourier(func: Any, gradient: RowGradient, dims: list[int], *args: Any) -> Any:
    """Not along the samples."""
    require(all(dim % gradient.dim() != gradient._layout.dim for dim in dims), "transforms the samples")
    return wrap(func(gradient._data, dims, *args), gradient._layout)


@rule("tril", "triu")
def triangle(func: Any, gradient: RowGradient, diagonal: int = 0) -> Any:
    """The samples are not one of the matrix dims."""
    require(gradient._layout.dim < gradient.dim() - 2, "the samples are a side of the triangle")
    return wrap(func(gradient._data, diagonal), gradient._layout)


@rule("index_select")
def index_select(func: Any, gradient: Any, dim: int, index: Tensor) -> Any:
    """Not along the samples."""
    require(isinstance(gradient, RowGradient), "the index is a gradient")
    require(dim % gradient.dim() != gradient._layout.dim, "picks samples")
    return wrap(func(gradient._data, dim, index), gradient._layout)


@rule("diagonal_backward")
def diagonal_backward(func: Any, gradient: RowGradient, size: Any, offset: int, first: int, second: int) -> Any:
    """The samples are not on the diagonal."""
    layout, size = gradient._layout, list(size)
    first, second = first % len(size), second % len(size)
    others = [dim for dim in range(len(size)) if dim not in (first, second)]
    require(layout.dim < len(others), "the samples are the diagonal")
    layout = layout.at(others[layout.dim])
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, offset, first, second), layout)
