"""One trip of small tensors to the host and one back: a copy each way, through pinned memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 16  # bytes: what compiled code assumes of a tensor's beginning


def to_host(tensors: Sequence[Tensor], dtype: torch.dtype, *, pin: bool) -> list[Tensor]:
    """The tensors on the host, contiguous and of ``dtype``, which holds each exactly; waits for the device."""
    packed = torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])
    landed = torch.empty(packed.shape, dtype=dtype, pin_memory=pin, device="cpu").copy_(packed)
    parts = landed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def room(like: Sequence[Tensor], *, pin: bool) -> tuple[Tensor, list[Tensor]]:
    """One buffer on the host, and views of it with the shapes and types of ``like``."""
    buffer = torch.empty(_end(like), dtype=torch.uint8, pin_memory=pin, device="cpu")
    return buffer, views(buffer, like)


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of ``buffer`` (bytes), on whatever device, with the shapes and types of ``like``."""
    found, begin = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        found.append(buffer[begin : begin + size].view(tensor.dtype).view(tensor.shape))
        begin += (size + ALIGNED - 1) // ALIGNED * ALIGNED
    return found


def _end(like: Sequence[Tensor]) -> int:
    return sum((t.numel() * t.element_size() + ALIGNED - 1) // ALIGNED * ALIGNED for t in like)
