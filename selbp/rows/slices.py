"""Chosen rows of the tensors that the forward saved, each copied at most once.

One activation is saved in many guises: as ReLU's result and the next layer's input, as (n, T, d) and (n * T, d), as
transposes, as the q, k and v of one projection. All are views of one storage in which a sample is a *block* of
``step`` consecutive elements, so the storage's blocks are what is copied and remembered; each guise is then a strided
view of the copy. A tensor whose rows are not such blocks is copied by itself.

How a tensor's rows lie follows from its sizes and strides alone, so it is worked out once (:func:`plan_of`) and kept
from step to step: what a step's Python does for a tensor is to look the plan up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from selbp.rows.registry import NoRuleError

if TYPE_CHECKING:
    from selbp.rows.layout import Layout, RowSet

REMEMBERED = 4  # copies kept: one activation's readers follow each other closely in a backward
WORTHWHILE = 4  # copy whole blocks when the tensor covers at least 1 / WORTHWHILE of them


class Plan(NamedTuple):
    """Where the rows of a tensor of given sizes and strides lie. Elements, not bytes."""

    size: tuple[int, ...]  # of the k rows
    expanded: bool  # every row is the same memory
    blocks: bool  # the rows are blocks of the storage
    whole: bool  # and the tensor is just these blocks, in order: (n, step) reshaped
    stride: tuple[int, ...]  # of the k rows within the copied blocks
    within: int  # where the tensor begins in its block
    start: int  # where the blocks begin in the storage
    end: int  # and where they end
    outer: int  # the storage holds (outer, n, step)
    step: int  # elements from one sample to the next


class Blocks(NamedTuple):
    """Memory of which every sample has blocks of ``step`` consecutive elements. Elements, not bytes."""

    stride: tuple[int, ...]  # of the k rows, once the memory holds (outer, k, step)
    within: int  # where the tensor begins in its block
    start: int  # where the blocks begin in the storage
    outer: int  # the blocks are (outer, n, step)
    step: int  # elements from one sample to the next


def blocks_of(shape: Sequence[int], stride: Sequence[int], offset: int, layout: Layout, dim: int) -> Blocks | None:
    """The blocks of a tensor whose dim ``dim`` has this layout; None where the samples' memory is not made of any."""
    n, k = layout.rows.n, layout.rows.k
    step = stride[dim] * layout.post
    if step == 0:
        return None
    outer, inner = layout.pre, 1 + (layout.post - 1) * stride[dim]
    strides = list(stride)
    for axis, (length, apart) in enumerate(zip(shape, stride, strict=True)):
        if axis == dim or length == 1 or apart == 0:
            continue
        if apart < step:
            inner += (length - 1) * apart
        elif apart % (n * step) == 0:
            outer += (length - 1) * (apart // (n * step))
            strides[axis] = apart // n * k
        else:
            return None
    within = offset % step
    return Blocks(tuple(strides), within, offset - within, outer, step) if within + inner <= step else None


def plan_of(tensor: Tensor, layout: Layout, dim: int) -> Plan:
    """The plan for ``tensor``, whose dim ``dim`` is (pre, n, post) flattened. Raises NoRuleError where it is not."""
    shape, stride = tuple(tensor.shape), tensor.stride()
    if shape[dim] != layout.full:
        raise NoRuleError(f"an operand has {shape[dim]} entries where the gradient's samples make {layout.full}")
    size = (*shape[:dim], layout.kept, *shape[dim + 1 :])
    if stride[dim] == 0:
        return Plan(size, True, False, False, (), 0, 0, 0, 0, 0)
    found = blocks_of(shape, stride, int(tensor.storage_offset()), layout, dim)
    span = 0 if found is None else found.outer * layout.rows.n * found.step
    if found is None or span > WORTHWHILE * tensor.numel():
        return Plan(size, False, False, False, (), 0, 0, 0, 0, 0)
    whole = dim == 0 and layout.post == found.outer == 1 and span == tensor.numel() and tensor.is_contiguous()
    start = found.start
    return Plan(size, False, True, whole, found.stride, found.within, start, start + span, found.outer, found.step)


class Slices:
    """The copies of one backward.

    Autograd frees what an operation saved as soon as it has run, and a copy must not hold its n-row source beyond
    that: sources are remembered by weak references. Such a reference keeps the storage's handle, not its memory, so
    that no other storage can take the handle's address, by which copies are found.
    """

    def __init__(self, rows: RowSet) -> None:
        self._rows = rows
        self._copies: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}

    def clear(self) -> None:
        """Forget every copy (the backward is over)."""
        self._copies.clear()

    def take(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """Rows of ``tensor``, whose dim ``dim`` is (pre, n, post) flattened; same strides order as ``tensor``."""
        if tensor.is_conj():  # the storage holds the conjugate; below dispatch torch would not resolve a lazy one
            return self.take(tensor.conj(), layout, dim).conj_physical()
        if tensor.is_neg():
            return self.take(torch._neg_view(tensor), layout, dim).neg()
        try:
            key = (dim, tensor.shape, tensor.stride(), tensor.storage_offset())
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, nested, oneDNN's own
            raise NoRuleError(f"an operand's memory is {tensor.layout}, not strided") from None
        plans = layout.plans
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = plan_of(tensor, layout, dim)
        size, expanded, blocks, whole, strides, within, start, end, outer, step = plan
        if expanded:
            return self._rows.alive(tensor.narrow(dim, 0, 1)).expand(size)
        if not blocks or end * tensor.itemsize > storage.nbytes():
            return self._alone(tensor, layout, dim)
        place = (storage._cdata, start, outer, step, tensor.dtype, tensor._version)
        found = self._copies.get(place)
        if found is None:
            cut = self._rows.cut
            if whole:
                copy = cut(tensor, 0)
                self._remember(place, storage, copy)
                return copy
            if outer == 1:
                copy = cut(tensor.as_strided((layout.rows.n, step), (step, 1), start), 0)
            else:
                n = layout.rows.n
                copy = cut(tensor.as_strided((outer, n, step), (n * step, step, 1), start), 1)
            self._remember(place, storage, copy)
        else:
            copy = found[1]
            if whole and copy.shape == size:
                return copy
        return copy.as_strided(size, strides, within)

    def _alone(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """A copy of this tensor only, in its own physical order of dims."""
        shape, stride, storage = tuple(tensor.shape), tensor.stride(), tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), shape, stride, dim, layout.pre, layout.post)
        key = (*place, tensor.dtype, tensor._version)
        found = self._copies.get(key)
        if found is None:
            x = tensor
            for axis, apart in enumerate(stride):
                if apart == 0 and axis != dim:
                    x = x.narrow(axis, 0, min(1, shape[axis]))
            x = x.unflatten(dim, (layout.pre, self._rows.n, layout.post))
            order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
            back = sorted(range(x.dim()), key=order.__getitem__)
            x = self._rows.cut(x.permute(order), back[dim + 1]).permute(back).flatten(dim, dim + 2)
            size = list(shape)
            size[dim] = layout.kept
            copy = x.expand(size)
            self._remember(key, storage, copy)
        else:
            copy = found[1]
        return copy

    def _remember(self, key: tuple[Any, ...], source: UntypedStorage, copy: Tensor) -> None:
        copies = self._copies
        copies[key] = (StorageWeakRef(source), copy)
        if len(copies) > REMEMBERED:
            del copies[next(iter(copies))]  # the oldest
