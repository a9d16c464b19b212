"""Rules of ``copy_`` into a view of fresh zeros, and of ``as_strided``.

The backward of a mean over channels-last planes makes ``new_zeros`` of the storage's size, copies the gradient into a
strided view of the zeros, and takes another view. The strides tell which elements belong to a sample. The backward of a
real Fourier transform copies into a slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.blocks import Blocks, blocks_of
from selbp.rows.gradient import RowGradient, Zeros
from selbp.rows.layout import Layout
from selbp.rows.registry import NoRuleError, require, rule, zero_rule
from selbp.rows.wrap import wrap_view, wrap_zeros, writable

aten = torch.ops.aten


@zero_rule("as_strided", "slice.Tensor", "select.int")
def view_of_zeros(func: Any, zeros: Any, *args: Any) -> Any:
    """A view of the zeros. The first write to the view decides where the samples are."""
    require(isinstance(zeros, Zeros) and zeros._parent is None, "the zeros are a view")
    shown = func(torch.empty(tuple(zeros.shape), dtype=zeros.dtype, device="meta"), *args)
    out = wrap_zeros(zeros, list(shown.shape), zeros.dtype, zeros.device, shown.stride())
    out._parent, out._view, zeros._viewed = zeros, (func, args, None), True
    return out


@zero_rule("copy_")
def fill(func: Any, zeros: Any, source: Any, non_blocking: bool = False) -> Any:
    """The view holds every sample whole."""
    require(isinstance(zeros, Zeros) and isinstance(source, RowGradient) and zeros.shape == source.shape, "not rows")
    layout, base = source._layout, zeros._parent
    if base is None:
        full_layout, memory, rows = layout, None, zeros.rows_of(layout)
    else:
        require(isinstance(base, Zeros), "the memory was written to before")
        view, args, _ = zeros._view
        if view is aten.as_strided.default:
            full_layout, memory, rows = _blocks(base, layout, source._data, *args)
        else:
            full_layout, memory, rows = _part(base, layout, view, *args)
    _become(zeros, rows.copy_(source._data), layout)
    if base is not None and memory is not None:
        _become(base, memory, full_layout)
    return zeros


def _part(base: Zeros, layout: Layout, view: Any, dim: int = 0, *args: Any) -> tuple[Layout, Tensor, Tensor]:
    """Return ``base``'s layout and rows, and a slice of the rows that is laid out as ``layout``."""
    dim %= base.dim()
    if view is aten.select.int:
        layout = layout.at(layout.dim + (dim <= layout.dim))
    require(layout.dim != dim, "a part of the samples")
    memory = base.rows_of(layout)
    return layout, memory, view(memory, dim, *args)


def _blocks(
    base: Zeros, layout: Layout, source: Tensor, size: Any, stride: Any, offset: int | None = None
) -> tuple[Layout, Tensor, Tensor]:
    """Return the same for strides. ``base``'s memory must be the samples' blocks and nothing else."""
    blocks = blocks_of(size, stride, offset or 0, layout.fold, layout.dim)
    require(blocks is not None and blocks.start == 0, "the samples' memory is not made of blocks")
    assert blocks is not None
    n, k = layout.rows.n, layout.rows.k
    require(
        base.dim() == 1 and base.numel() == blocks.outer * n * blocks.step, "the memory holds more than the samples"
    )
    memory = torch.zeros(blocks.outer * k * blocks.step, dtype=base.dtype, device=base.device)
    full_layout = layout.rows.layout(0, blocks.outer, blocks.step)
    return full_layout, memory, memory.as_strided(source.shape, blocks.stride, blocks.within)


def _become(zeros: Any, data: Tensor, layout: Layout) -> None:
    zeros._data, zeros._layout, zeros.__class__ = data, layout, RowGradient


@rule("copy_")
def copy(func: Any, gradient: Any, source: Any, non_blocking: bool = False) -> Any:
    """From a gradient of the same selection, laid out alike."""
    both = isinstance(gradient, RowGradient) and isinstance(source, RowGradient) and writable(gradient)
    require(both and gradient._layout is source._layout and gradient.shape == source.shape, "not rows laid out alike")
    gradient._data.copy_(source._data)
    return gradient


@rule("as_strided")
def strided(func: Any, gradient: RowGradient, size: Any, stride: Any, offset: int | None = None) -> Any:
    """The memory is made of the samples' blocks alone, and the result has all samples."""
    layout, data = gradient._layout, gradient._data
    memory = blocks_of(gradient.shape, gradient.stride(), 0, layout.fold, layout.dim)
    require(gradient._parent is None, "the strides are of another tensor's memory")
    require(memory is not None and layout.rows.n > 1, "the samples' memory is not made of blocks")
    assert memory is not None
    alike = zip(data.shape, data.stride(), memory.stride, strict=True)
    require(all(length == 1 or stored == shown for length, stored, shown in alike), "the rows lie otherwise in memory")
    layout, blocks = _reading(layout, memory, size, stride, offset or 0)
    kept = list(size)
    kept[layout.dim] = layout.kept
    out = data.as_strided(kept, blocks.stride, data.storage_offset() + blocks.within)
    return wrap_view(out, layout, gradient, func, (size, stride, offset))


def _reading(rows: Layout, memory: Blocks, size: Any, stride: Any, offset: int) -> tuple[Layout, Blocks]:
    """Return the layout whose dim steps from sample to sample of ``memory``, and the result's blocks."""
    n, step = rows.rows.n, memory.step
    for dim, (length, apart) in enumerate(zip(size, stride, strict=True)):
        if length and apart > 0 and step % apart == 0 and length % (n * (step // apart)) == 0:
            post = step // apart
            layout = rows.rows.layout(dim, length // (n * post), post)
            blocks = blocks_of(size, stride, offset, layout.fold, dim)
            if blocks is not None and blocks.start == 0 and blocks.outer <= memory.outer:
                return layout, blocks
    raise NoRuleError("the strides do not walk from sample to sample")
