"""Make row gradients: from k rows and their layout, as a view of another one, or as zeros to be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient, Wrapper, Zeros, dense_strides
from selbp.rows.layout import Layout

_make_wrapper = torch.Tensor._make_wrapper_subclass
# C++ code that asks for a pointer gets an error, not a null pointer.
_guard_pointer = getattr(torch._C, "_set_throw_on_mutable_data_ptr", lambda tensor: None)

_SizeAndStride = tuple[tuple[int, ...], tuple[int, ...]]


def wrap(data: Tensor, layout: Layout, outer: _SizeAndStride | None = None) -> RowGradient:
    """Return the gradient of n samples whose k rows are ``data``.

    Dim ``layout.dim`` of ``data`` holds (pre, k, post) flattened. ``outer`` is the size and the strides that the
    gradient shows, if the caller knows them.
    """
    if outer is None:
        key = (data.shape, data.stride())
        outer = layout.outer.get(key)
        if outer is None:
            outer = layout.outer[key] = _outer(data, layout)
    out: RowGradient = _make_wrapper(RowGradient, outer[0], outer[1], dtype=data.dtype, device=data.device)
    _guard_pointer(out)
    out._data, out._layout, out._rows, out._parent, out._viewed = data, layout, layout.rows, None, False
    return out


def _outer(data: Tensor, layout: Layout) -> _SizeAndStride:
    """Return size and strides of the tensor of n samples whose k rows are ``data``."""
    size, stride, dim = list(data.shape), data.stride(), layout.dim
    contiguous = data.is_contiguous()
    if size[dim] != layout.kept:
        raise AssertionError(f"a rule returned {tuple(size)} for {layout}")
    size[dim] = layout.full
    if contiguous:
        return tuple(size), tuple(dense_strides(size, range(len(size), 0, -1)))
    if layout.kept == 1:  # the stride of a single row is arbitrary
        return tuple(size), tuple(dense_strides(size, stride))
    if max(stride) != stride[dim] and stride[dim]:  # dims outside the samples' lie further apart in the full tensor
        n, k, step = layout.rows.n, layout.rows.k, stride[dim]
        stride = tuple(-(-each // k) * n if each > step else each for each in stride)
    return tuple(size), stride


def wrap_view(
    data: Tensor, layout: Layout, parent: RowGradient, func: Any, args: tuple[Any, ...], which: int | None = None
) -> RowGradient:
    """Return :func:`wrap` of the view ``func(parent, *args)`` (its result ``which``), whose rows are ``data``."""
    out = wrap(data, layout, None if layout.rows.k > 1 else _outer_of_view(parent, func, args, which))
    out._parent, out._view, parent._viewed = parent, (func, args, which), True
    return out


def _outer_of_view(parent: RowGradient, func: Any, args: tuple[Any, ...], which: int | None) -> _SizeAndStride:
    """Return size and strides of a view of the n rows.

    With k = 1 they do not follow from the rows' own strides, because the stride of a single row is arbitrary.
    """
    n_rows = torch.empty_strided(parent.shape, parent.stride(), dtype=parent.dtype, device="meta")
    view = func(n_rows, *args)
    view = view if which is None else view[which]
    return tuple(view.shape), view.stride()


def wrap_zeros(like: Wrapper, size: list[int], dtype: torch.dtype, device: torch.device, stride: Any = None) -> Zeros:
    """Return the zeros that ``new_zeros`` of a row gradient makes."""
    out: Zeros = _make_wrapper(Zeros, size, stride, dtype=dtype, device=device)
    _guard_pointer(out)
    out._rows, out._parent, out._viewed = like._rows, None, False
    return out


def base_of(gradient: Wrapper) -> Wrapper:
    """Return the tensor that ``gradient`` is a view of, directly or through other views; itself if it is no view."""
    while gradient._parent is not None:
        gradient = gradient._parent
    return gradient


def writable(gradient: RowGradient) -> bool:
    """Return whether a write to the rows reaches everything that would share its memory on n rows."""
    copied = gradient._rows.copied
    return not copied or id(base_of(gradient)) not in copied
