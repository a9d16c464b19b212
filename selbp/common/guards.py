"""What a scoring forward must not disturb: modes, random state, autocast's cache and running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


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


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Autocast must not remember a weight that was cast under ``no_grad``: the forward that trains would reuse it."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


class RunningStatistics:
    """The batch-norm layers that follow statistics in training mode."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Layers normalise with the batch's statistics inside and do not update their running ones."""
        layers = [layer for layer in self._layers if layer.training]
        for layer in layers:
            layer.track_running_stats = False
        try:
            yield
        finally:
            for layer in layers:
                layer.track_running_stats = True

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the running statistics back as they are now."""
        saved = [(buffer, buffer.clone()) for m in self._layers if m.training for buffer in m.buffers(recurse=False)]

        def restore() -> None:
            with torch.no_grad():
                for buffer, value in saved:
                    buffer.copy_(value)

        return restore


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
        self.enabled, self._dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def apply(self) -> None:
        """Put it back, until the enclosing context ends."""
        torch.set_autocast_enabled(self._type, self.enabled)
        torch.set_autocast_dtype(self._type, self._dtype)

    def within(self) -> AbstractContextManager[None]:
        """It is in force inside."""
        return torch.autocast(self._type, dtype=self._dtype, enabled=self.enabled)


def scoring_autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """The scoring forward's precision: the caller's own for ``"same"``, else autocast to that dtype."""
    if precision == "same":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))
