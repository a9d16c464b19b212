"""Chosen rows of the tensors that the forward saved, each copied at most once.

One activation is saved in many guises: as ReLU's result and the next layer's input, as (n, T, d) and (n * T, d), as
transposes, as the q, k and v of one projection. All are views of one storage in which a sample is a *block* of
``step`` consecutive elements, so the storage's blocks are what is copied and remembered; each guise is then a strided
view of the copy. A tensor whose rows are not such blocks is copied by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from selbp.training.backward.rows.registry import NoRuleError

if TYPE_CHECKING:
    from selbp.training.backward.rows.layout import Layout, RowSet

REMEMBERED = 4  # copies kept: one activation's readers follow each other closely in a backward
WORTHWHILE = 4  # copy whole blocks when the tensor covers at least 1 / WORTHWHILE of them


class Slices:
    """The copies of one backward. A source is kept alive while remembered, so its address cannot be reused."""

    def __init__(self, rows: RowSet) -> None:
        self._rows = rows
        self._copies: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()

    def clear(self) -> None:
        """Forget every copy (the backward is over)."""
        self._copies.clear()

    def take(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """Rows of ``tensor``, whose dim ``dim`` is (pre, n, post) flattened; same strides order as ``tensor``."""
        size, stride = list(tensor.shape), tensor.stride()
        if size[dim] != layout.full:
            raise NoRuleError(f"an operand has {size[dim]} entries where the gradient's samples make {layout.full}")
        size[dim] = layout.kept
        n, k = self._rows.n, self._rows.k
        step = stride[dim] * layout.post  # elements from one sample to the next
        if step == 0:  # an expanded dim: every row is the same
            return tensor.narrow(dim, 0, 1).expand(size)
        outer, inner, blocks = layout.pre, 1 + (layout.post - 1) * stride[dim], True
        strides = list(stride)
        for axis, (length, apart) in enumerate(zip(tensor.shape, stride, strict=True)):
            if axis == dim or length == 1 or apart == 0:
                continue
            if apart < step:
                inner += (length - 1) * apart
            elif apart % (n * step) == 0:
                outer += (length - 1) * (apart // (n * step))
                strides[axis] = apart // n * k
            else:
                blocks = False
        offset = tensor.storage_offset()
        within = offset % step
        start = offset - within
        span = outer * n * step
        storage = tensor.untyped_storage()
        if (
            not blocks
            or within + inner > step
            or (start + span) * tensor.itemsize > storage.nbytes()
            or span > WORTHWHILE * tensor.numel()
        ):
            return self._alone(tensor, layout, dim)
        key = (storage.data_ptr(), start, outer, step, tensor.dtype, tensor._version)
        found = self._copies.get(key)
        if found is None:
            index = self._rows.on(tensor.device)
            if outer == 1:
                copy = tensor.as_strided((n, step), (step, 1), start).index_select(0, index)
            else:
                copy = tensor.as_strided((outer, n, step), (n * step, step, 1), start).index_select(1, index)
            self._remember(key, tensor, copy)
        else:
            copy = found[1]
        return copy.as_strided(size, strides, within)

    def _alone(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """A copy of this tensor only, in its own physical order of dims."""
        shape, stride = tuple(tensor.shape), tensor.stride()
        key = (tensor.data_ptr(), shape, stride, dim, layout.pre, layout.post, tensor.dtype, tensor._version)
        found = self._copies.get(key)
        if found is None:
            index, x = self._rows.on(tensor.device), tensor
            for axis, apart in enumerate(stride):
                if apart == 0 and axis != dim:
                    x = x.narrow(axis, 0, min(1, shape[axis]))
            x = x.unflatten(dim, (layout.pre, self._rows.n, layout.post))
            order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
            back = sorted(range(x.dim()), key=order.__getitem__)
            x = x.permute(order).index_select(back[dim + 1], index).permute(back).flatten(dim, dim + 2)
            size = list(shape)
            size[dim] = layout.kept
            copy = x.expand(size)
            self._remember(key, tensor, copy)
        else:
            copy = found[1]
        return copy

    def _remember(self, key: tuple[Any, ...], source: Tensor, copy: Tensor) -> None:
        self._copies[key] = (source, copy)
        if len(self._copies) > REMEMBERED:
            self._copies.popitem(last=False)
