"""What a scoring forward must not disturb: modes, random state and precision."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode inside; every module's own mode and the random state of CPU and ``device`` come back after."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Full precision inside: autocast would round a Gram matrix to 16 bits."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


PRECISIONS = ("same", "bfloat16", "float16")  # of the forward that scores


class AutocastMode:
    """Autocast on ``device`` as it is now, to be put back elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._type = device.type
        self.enabled, self.dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def apply(self) -> None:
        """Put it back, until the enclosing context ends."""
        torch.set_autocast_enabled(self._type, self.enabled)
        torch.set_autocast_dtype(self._type, self.dtype)

    def within(self) -> AbstractContextManager[None]:
        """It is in force inside."""
        return torch.autocast(self._type, dtype=self.dtype, enabled=self.enabled)


def scoring_autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The scoring forward's precision: the caller's own for ``"same"``, else autocast to that dtype."""
    if precision == "same":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


@contextmanager
def random_state_put_back(device: torch.device) -> Iterator[None]:
    """The random state of torch, on the CPU and ``device``, of Python and of NumPy is as before afterwards."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(drawn)
