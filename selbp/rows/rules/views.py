"""Rules of views: where the samples are afterwards. The result shares the gradient's memory and keeps its parent."""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from selbp.rows.engine import becomes_leaf_grad
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import Layout
from selbp.rows.registry import NoRuleError, require, rule
from selbp.rows.wrap import wrap, wrap_view

aten = torch.ops.aten


def follow(shape: Any, layout: Layout, size: Any) -> tuple[list[int], tuple[int, int, int]]:
    """Return the stored size, and the layout's (dim, pre, post), after viewing ``shape`` as ``size``.

    In row-major order an element's position is (left, sample, right): ``left`` runs over everything before the samples,
    ``right`` over everything after them. The new dim of the samples must hold all n of them. It then spans
    (left / before) * n * (right / after) positions, where ``before`` and ``after`` are the products of the dims before
    and after it. Raises NoRuleError if no dim does.
    """
    out = list(size)
    if -1 in out:
        known = -prod(out)
        out[out.index(-1)] = prod(shape) // max(1, known)
    dim, n = layout.dim, layout.rows.n
    left, right = prod(shape[:dim]) * layout.pre, layout.post * prod(shape[dim + 1 :])
    before, after = 1, prod(out)
    for axis, length in enumerate(out):
        after = after // length if length else prod(out[axis + 1 :])
        if left % before == 0 and after and right % after == 0:
            pre, post = left // before, right // after
            if length == pre * n * post:
                out[axis] = pre * layout.rows.k * post
                return out, (axis, pre, post)
        before *= max(length, 1)
    raise NoRuleError("the view splits the samples between dims")


@rule("view", "_unsafe_view")
def view(func: Any, gradient: RowGradient, size: Any, *args: Any) -> Any:
    """No dim of the result holds only a part of the samples."""
    data, layout = gradient._data, gradient._layout
    if layout.dim == 0 and layout.post == 1 and size and size[0] == layout.full:
        out = [layout.kept, *size[1:]]  # the samples stay in front
    else:
        key = (gradient.shape, tuple(size))
        known = layout.views.get(key)
        if known is None:
            known = layout.views[key] = follow(gradient.shape, layout, size)
        out, place = known
        layout = layout.rows.layout(*place)
    try:
        return wrap_view(data.view(out), layout, gradient, aten.view.default, (size,))
    except RuntimeError:  # the k rows lie in memory in another way than the n would
        require(func is not aten.view.default, "the rows' memory does not admit the view")
        return wrap(data.reshape(out), layout)


@rule("t")
def matrix_transpose(func: Any, gradient: RowGradient) -> Any:
    """Always."""
    layout = gradient._layout
    after = layout.at(1 - layout.dim) if gradient.dim() == 2 else layout
    return wrap_view(gradient._data.t(), after, gradient, func, ())


@rule("transpose.int")
def transpose(func: Any, gradient: RowGradient, first: int, second: int) -> Any:
    """Always."""
    ndim, layout = gradient.dim(), gradient._layout
    first, second = first % ndim, second % ndim
    dim = second if layout.dim == first else first if layout.dim == second else layout.dim
    return wrap_view(gradient._data.transpose(first, second), layout.at(dim), gradient, func, (first, second))


@rule("permute")
def permute(func: Any, gradient: RowGradient, dims: list[int]) -> Any:
    """Always."""
    ndim, layout = gradient.dim(), gradient._layout
    after = layout.at([dim % ndim for dim in dims].index(layout.dim))
    return wrap_view(gradient._data.permute(dims), after, gradient, func, (dims,))


@rule("unsqueeze")
def unsqueeze(func: Any, gradient: RowGradient, dim: int) -> Any:
    """Always."""
    layout = gradient._layout
    dim %= gradient.dim() + 1
    after = layout.at(layout.dim + (dim <= layout.dim))
    return wrap_view(gradient._data.unsqueeze(dim), after, gradient, func, (dim,))


@rule("squeeze.dim", "squeeze.dims", "squeeze")
def squeeze(func: Any, gradient: RowGradient, dims: Any = None) -> Any:
    """The samples' dim is not squeezed (it has size 1 if n = 1)."""
    ndim, layout = gradient.dim(), gradient._layout
    wanted = range(ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = sorted({dim % ndim for dim in wanted if gradient.shape[dim] == 1})
    require(layout.dim not in gone, "the only sample's dim disappears")
    data = gradient._data
    for dim in reversed(gone):
        data = data.squeeze(dim)
    after = layout.at(layout.dim - sum(dim < layout.dim for dim in gone))
    return wrap_view(data, after, gradient, func, () if dims is None else (dims,))


@rule("expand")
def expand(func: Any, gradient: RowGradient, size: Any, **kwargs: Any) -> Any:
    """The samples' dim is not expanded."""
    layout, kept = gradient._layout, list(size)
    dim = layout.dim + len(kept) - gradient.dim()
    require(kept[dim] in (-1, layout.full), "the samples' dim is expanded")
    kept[dim] = layout.kept
    return wrap_view(gradient._data.expand(kept), layout.at(dim), gradient, func, (size,))


@rule("select.int")
def select(func: Any, gradient: RowGradient, dim: int, index: int) -> Any:
    """Not along the samples."""
    layout = gradient._layout
    dim %= gradient.dim()
    require(dim != layout.dim, "takes one sample")
    after = layout.at(layout.dim - (dim < layout.dim))
    return wrap_view(gradient._data.select(dim, index), after, gradient, func, (dim, index))


def whole_sets(layout: Layout, start: int, end: int, step: int, size: int) -> tuple[int, int]:
    """Return ``start:end`` of a samples' dim of ``size`` in sets of n samples. Raises NoRuleError if it splits a set.

    The dim is (pre, n, post). After ``cat`` of three tensors, for example, a part of it can be all n samples of one.
    """
    length = layout.rows.n * layout.post
    start, end = max(start + size if start < 0 else start, 0), min(end + size if end < 0 else end, size)
    sets = step == 1 and length > 0 and start % length == end % length == 0 and start < end
    require(sets, "takes a part of the samples")
    return start // length, end // length


@rule("slice.Tensor")
def narrow(func: Any, gradient: RowGradient, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Not along the samples, or only whole sets of n samples."""
    layout = gradient._layout
    dim %= gradient.dim()
    if dim == layout.dim:
        first, last = whole_sets(layout, start or 0, layout.full if end is None else end, step, layout.full)
        kept = layout.rows.k * layout.post
        layout = layout.rows.layout(dim, last - first, layout.post)
        data = gradient._data.narrow(dim, first * kept, (last - first) * kept)
    else:
        data = func(gradient._data, dim, start, end, step)
    return wrap_view(data, layout, gradient, func, (dim, start, end, step))


@rule("unbind.int")
def unbind(func: Any, gradient: RowGradient, dim: int = 0) -> Any:
    """Not along the samples."""
    layout = gradient._layout
    dim %= gradient.dim()
    require(dim != layout.dim, "takes the samples apart")
    layout = layout.at(layout.dim - (dim < layout.dim))
    parts = func(gradient._data, dim)
    return [wrap_view(part, layout, gradient, func, (dim,), i) for i, part in enumerate(parts)]


@rule("split.Tensor", "split_with_sizes")
def split(func: Any, gradient: RowGradient, sizes: Any, dim: int = 0) -> Any:
    """Not along the samples."""
    require(dim % gradient.dim() != gradient._layout.dim, "takes the samples apart")
    parts = func(gradient._data, sizes, dim)
    return [wrap_view(part, gradient._layout, gradient, func, (sizes, dim), i) for i, part in enumerate(parts)]


@rule("diagonal")
def diagonal(func: Any, gradient: RowGradient, offset: int = 0, first: int = 0, second: int = 1) -> Any:
    """The samples are not on the diagonal."""
    ndim, layout = gradient.dim(), gradient._layout
    first, second = first % ndim, second % ndim
    require(layout.dim not in (first, second), "the samples are a side of the diagonal")
    after = layout.at(layout.dim - (first < layout.dim) - (second < layout.dim))
    return wrap_view(func(gradient._data, offset, first, second), after, gradient, func, (offset, first, second))


@rule("alias", "view_as_real", "view_as_complex")
def same_samples(func: Any, gradient: RowGradient) -> Any:
    """The samples are not the dim of real and imaginary parts."""
    layout = gradient._layout
    apart = func is not aten.view_as_complex.default or layout.dim < gradient.dim() - 1
    require(apart, "the samples are complex parts")
    return wrap_view(func(gradient._data), layout, gradient, func, ())


@rule("detach")
def detach(func: Any, gradient: RowGradient) -> Any:
    """The result does not become the ``.grad`` of a leaf, which is an ordinary tensor. A checkpoint's own may."""
    require(not becomes_leaf_grad(gradient._rows.task), "a leaf's gradient is an ordinary tensor")
    return wrap_view(gradient._data.detach(), gradient._layout, gradient, func, ())
