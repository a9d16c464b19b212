"""Where the samples of a tensor lie in its storage, from sizes and strides alone. All numbers are elements, not bytes.

In most tensors that a forward saves, a sample is a *block* of ``step`` consecutive elements of the storage: the storage
holds (outer, n, step). A copy of the chosen rows then holds (outer, k, step), and the tensor's rows are a strided view
of the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from selbp.rows.registry import NoRuleError

WORTHWHILE = 4  # copy whole blocks if the tensor covers at least 1 / WORTHWHILE of them


class Fold(NamedTuple):
    """A dim that holds the samples: (pre, n, post) flattened, of which (pre, k, post) are kept."""

    n: int
    k: int
    pre: int
    post: int


class Blocks(NamedTuple):
    """Memory in which every sample has blocks of ``step`` consecutive elements."""

    stride: tuple[int, ...]  # of the k rows, in memory that holds (outer, k, step)
    within: int  # where the tensor begins in its block
    start: int  # where the blocks begin in the storage
    outer: int  # the blocks are (outer, n, step)
    step: int  # elements from one sample to the next


class Plan(NamedTuple):
    """How to copy the chosen rows of a tensor of given sizes and strides."""

    size: tuple[int, ...]  # of the k rows
    expanded: bool  # whether every row is the same memory
    blocks: bool  # whether the rows are blocks of the storage; if not, the fields below are not set
    whole: bool = False  # whether the tensor is exactly these blocks, in order: (n, step) reshaped
    stride: tuple[int, ...] = ()  # of the k rows within the copied blocks
    within: int = 0  # where the tensor begins in its block
    start: int = 0  # where the blocks begin in the storage
    end: int = 0  # and where they end
    outer: int = 0  # the storage holds (outer, n, step)
    step: int = 0  # elements from one sample to the next


def blocks_of(shape: Sequence[int], stride: Sequence[int], offset: int, fold: Fold, dim: int) -> Blocks | None:
    """Return the blocks of a tensor whose dim ``dim`` is folded so; None if its samples are not blocks of memory."""
    n, k, pre, post = fold
    step = stride[dim] * post
    if step == 0:
        return None
    outer, inner = pre, 1 + (post - 1) * stride[dim]
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


def plan_of(tensor: Tensor, fold: Fold, dim: int) -> Plan:
    """Return the plan for ``tensor``, whose dim ``dim`` is folded so. Raises NoRuleError if the sizes differ."""
    shape, stride = tuple(tensor.shape), tensor.stride()
    n, k, pre, post = fold
    if shape[dim] != pre * n * post:
        raise NoRuleError(f"an operand has {shape[dim]} entries where the gradient's samples make {pre * n * post}")
    size = (*shape[:dim], pre * k * post, *shape[dim + 1 :])
    if stride[dim] == 0:
        return Plan(size, expanded=True, blocks=False)
    memory = blocks_of(shape, stride, int(tensor.storage_offset()), fold, dim)
    span = 0 if memory is None else memory.outer * n * memory.step
    if memory is None or span > WORTHWHILE * tensor.numel():
        return Plan(size, expanded=False, blocks=False)
    whole = dim == 0 and post == memory.outer == 1 and span == tensor.numel() and tensor.is_contiguous()
    start = memory.start
    return Plan(size, False, True, whole, memory.stride, memory.within, start, start + span, memory.outer, memory.step)
