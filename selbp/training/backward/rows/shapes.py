"""Rules of views and data movement: where the samples stand afterwards."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from selbp.training.backward.rows.layout import Layout
from selbp.training.backward.rows.registry import NoRuleError, need, rule
from selbp.training.backward.rows.tensor import RowGradient, wrap

aten = torch.ops.aten


def follow(shape: Any, layout: Layout, size: Any) -> tuple[list[int], Layout]:
    """The stored size and the layout after viewing ``shape`` as ``size``.

    Row-major, an element's position is (left, sample, right) with ``left`` and ``right`` running over what stands
    before and after the samples. The new dim that holds the samples must hold all n of them: it spans (left / before) *
    n * (right / after) positions, where ``before`` and ``after`` are the products of the dims on either side of it.
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
                return out, layout.rows.layout(axis, pre, post)
        before *= max(length, 1)
    raise NoRuleError("the view splits the samples between dims")


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def view(func: Any, gradient: RowGradient, size: Any, *args: Any) -> Any:
    """No dim of the result holds only a part of the samples."""
    data, layout = gradient._data, gradient._layout
    shape = gradient.shape
    if layout.dim == 0 and layout.post == 1 and len(size) and size[0] == layout.full and len(shape) > 0:
        out = [layout.kept, *size[1:]]  # the samples stay in front
    else:
        out, layout = follow(shape, layout, size)
    try:
        return wrap(data.view(out), layout)
    except RuntimeError:  # the k rows lie otherwise in memory than the n would
        need(func is not aten.view.default, "the rows' memory does not admit the view")
        return wrap(data.reshape(out), layout)


@rule("t")
def matrix_transpose(func: Any, gradient: RowGradient) -> Any:
    """Always."""
    layout = gradient._layout
    return wrap(gradient._data.t(), layout.at(1 - layout.dim) if gradient.dim() == 2 else layout)


@rule("transpose.int")
def transpose(func: Any, gradient: RowGradient, first: int, second: int) -> Any:
    """Always."""
    ndim, layout = gradient.dim(), gradient._layout
    first, second = first % ndim, second % ndim
    dim = second if layout.dim == first else first if layout.dim == second else layout.dim
    return wrap(gradient._data.transpose(first, second), layout.at(dim))


@rule("permute")
def permute(func: Any, gradient: RowGradient, dims: list[int]) -> Any:
    """Always."""
    ndim, layout = gradient.dim(), gradient._layout
    return wrap(gradient._data.permute(dims), layout.at([dim % ndim for dim in dims].index(layout.dim)))


@rule("unsqueeze")
def unsqueeze(func: Any, gradient: RowGradient, dim: int) -> Any:
    """Always."""
    layout = gradient._layout
    dim %= gradient.dim() + 1
    return wrap(gradient._data.unsqueeze(dim), layout.at(layout.dim + (dim <= layout.dim)))


@rule("squeeze.dim", "squeeze.dims", "squeeze")
def squeeze(func: Any, gradient: RowGradient, dims: Any = None) -> Any:
    """Always; the samples' dim stays even where n is 1."""
    ndim, layout = gradient.dim(), gradient._layout
    wanted = range(ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = sorted({dim % ndim for dim in wanted if gradient.shape[dim] == 1})
    need(layout.dim not in gone, "the only sample's dim disappears")
    data = gradient._data
    for dim in reversed(gone):
        data = data.squeeze(dim)
    return wrap(data, layout.at(layout.dim - sum(dim < layout.dim for dim in gone)))


@rule("expand")
def expand(func: Any, gradient: RowGradient, size: Any, **kwargs: Any) -> Any:
    """The samples' dim is not what is expanded."""
    layout, size = gradient._layout, list(size)
    dim = layout.dim + len(size) - gradient.dim()
    need(size[dim] in (-1, layout.full), "the samples' dim is expanded")
    size[dim] = layout.kept
    return wrap(gradient._data.expand(size), layout.at(dim))


@rule("select.int")
def select(func: Any, gradient: RowGradient, dim: int, index: int) -> Any:
    """Not along the samples."""
    layout = gradient._layout
    dim %= gradient.dim()
    need(dim != layout.dim, "takes one sample")
    return wrap(gradient._data.select(dim, index), layout.at(layout.dim - (dim < layout.dim)))


def blocks(layout: Layout, start: int, end: int, step: int, size: int) -> tuple[int, int]:
    """``start:end`` of a samples' dim of ``size`` in units of n samples: (first, last), where it cuts no n apart.

    The dim is (pre, n, post): after ``cat`` of three tensors, say, a part of it can be all n samples of one.
    """
    whole = layout.rows.n * layout.post
    start, end = max(start + size if start < 0 else start, 0), min(end + size if end < 0 else end, size)
    need(step == 1 and whole > 0 and start % whole == end % whole == 0 and start < end, "takes a part of the samples")
    return start // whole, end // whole


@rule("slice.Tensor")
def narrow(func: Any, gradient: RowGradient, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Not along the samples, or whole sets of n."""
    layout = gradient._layout
    dim %= gradient.dim()
    if dim == layout.dim:
        first, last = blocks(layout, start or 0, layout.full if end is None else end, step, layout.full)
        kept = layout.rows.k * layout.post
        layout = layout.rows.layout(dim, last - first, layout.post)
        return wrap(gradient._data.narrow(dim, first * kept, (last - first) * kept), layout)
    return wrap(func(gradient._data, dim, start, end, step), layout)


@rule("slice_backward")
def narrow_backward(func: Any, gradient: RowGradient, size: Any, dim: int, start: int, end: int, step: int) -> Any:
    """Not along the samples, or whole sets of n."""
    layout, size = gradient._layout, list(size)
    dim %= len(size)
    if dim == layout.dim:
        first, last = blocks(layout, start, end, step, size[dim])
        need(
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
    need(dim != layout.dim and layout.dim < len(size), "windows over the samples")
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, dim, length, step), layout)


@rule("unbind.int")
def unbind(func: Any, gradient: RowGradient, dim: int = 0) -> Any:
    """Not along the samples."""
    layout = gradient._layout
    dim %= gradient.dim()
    need(dim != layout.dim, "takes the samples apart")
    layout = layout.at(layout.dim - (dim < layout.dim))
    return [wrap(item, layout) for item in func(gradient._data, dim)]


@rule("split.Tensor", "split_with_sizes", "chunk")
def split(func: Any, gradient: RowGradient, sizes: Any, dim: int = 0) -> Any:
    """Not along the samples."""
    need(dim % gradient.dim() != gradient._layout.dim, "takes the samples apart")
    return [wrap(item, gradient._layout) for item in func(gradient._data, sizes, dim)]


def same_layout(parts: Any) -> tuple[Layout, list[Tensor]]:
    """The layout that all ``parts`` share, and their rows. An unused part's gradient is a plain tensor of zeros."""
    first = next(part for part in parts if isinstance(part, RowGradient))
    layout, rows = first._layout, []
    for part in parts:
        if isinstance(part, RowGradient):
            need(part._layout is layout, "two gradients with their samples in different places")
            rows.append(part._data)
        else:
            zeros = part.dim() == first.dim() and part.device.type == "cpu" and not part.any()
            need(zeros, "a part is dense")
            size = list(part.shape)
            need(size[layout.dim] == layout.full, "a part has its samples elsewhere")
            size[layout.dim] = layout.kept
            rows.append(part.new_zeros(size))
    return layout, rows


@rule("cat")
def concatenate(func: Any, parts: list[Any], dim: int = 0) -> Any:
    """All parts are gradients of the same selection laid out alike, or (on a CPU) zeros."""
    layout, rows = same_layout(parts)
    dim %= parts[0].dim()
    if dim == layout.dim:  # blocks one after another: (parts, pre, n, post)
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
    need(value == 0 and not any(padding[behind : behind + 2]), "pads the samples, or not with 0")
    return wrap(func(gradient._data, padding, value), gradient._layout)


@rule("flip", "roll", "cumsum")
def along(func: Any, gradient: RowGradient, amount: Any, dims: Any = None, **kwargs: Any) -> Any:
    """Not along the samples."""
    over = dims if func is aten.roll.default else amount
    over = [over] if isinstance(over, int) else over
    need(bool(over) and all(dim % gradient.dim() != gradient._layout.dim for dim in over), "runs along the samples")
    args = (amount,) if dims is None else (amount, dims)
    return wrap(func(gradient._data, *args, **kwargs), gradient._layout)


@rule("tril", "triu")
def triangle(func: Any, gradient: RowGradient, diagonal: int = 0) -> Any:
    """The samples are not one of the matrix dims."""
    need(gradient._layout.dim < gradient.dim() - 2, "the samples are a side of the triangle")
    return wrap(func(gradient._data, diagonal), gradient._layout)


@rule("index_select")
def index_select(func: Any, gradient: Any, dim: int, index: Tensor) -> Any:
    """Not along the samples."""
    need(isinstance(gradient, RowGradient), "the index is a gradient")
    need(dim % gradient.dim() != gradient._layout.dim, "picks samples")
    return wrap(func(gradient._data, dim, index), gradient._layout)


@rule("diagonal")
def diagonal(func: Any, gradient: RowGradient, offset: int = 0, first: int = 0, second: int = 1) -> Any:
    """The samples are not on the diagonal."""
    ndim, layout = gradient.dim(), gradient._layout
    first, second = first % ndim, second % ndim
    need(layout.dim not in (first, second), "the samples are a side of the diagonal")
    dim = layout.dim - (first < layout.dim) - (second < layout.dim)
    return wrap(func(gradient._data, offset, first, second), layout.at(dim))


@rule("diagonal_backward")
def diagonal_backward(func: Any, gradient: RowGradient, size: Any, offset: int, first: int, second: int) -> Any:
    """The samples are not on the diagonal."""
    layout, size = gradient._layout, list(size)
    first, second = first % len(size), second % len(size)
    others = [dim for dim in range(len(size)) if dim not in (first, second)]
    need(layout.dim < len(others), "the samples are the diagonal")
    layout = layout.at(others[layout.dim])
    size[layout.dim] = layout.kept
    return wrap(func(gradient._data, size, offset, first, second), layout)
