"""Switches and counters of torch that more than one room reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def version_of(tensor: Tensor) -> int:
    """How often ``tensor``'s memory has been written to; 0 for an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Autocast must not remember a weight that was cast under ``no_grad``: the forward that trains would reuse it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
