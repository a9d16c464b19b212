"""What a scoring forward must not disturb: modes, random state, autocast's cache and running statistics."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
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


_Group = tuple[str, torch.dtype, torch.device]


class RunningStatistics:
    """The batch-norm layers that follow statistics in training mode."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
        self._kept: dict[_Group, list[Tensor]] = {}  # copies, by what for, and type and device of what they are of
        self._backward = -1  # the engine's run whose traces are put back

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, layers normalise as ever, and update copies in place of their running statistics.

        What autograd saves of a layer is the same with copies as without: a checkpoint compares what it saved in a
        forward inside with what it saves when it runs again outside.
        """
        copy_of = {
            id(buffer): copy
            for buffers, copies in self._copied("pause")
            for buffer, copy in zip(buffers, copies, strict=True)
        }
        own = [
            (layer, name, buffer)
            for layer in self._layers
            for name, buffer in layer._buffers.items()
            if id(buffer) in copy_of
        ]
        for layer, name, buffer in own:
            layer._buffers[name] = copy_of[id(buffer)]
        try:
            yield
        finally:
            for layer, name, buffer in own:
                layer._buffers[name] = buffer

    def paused_in_backward(self, loss: Tensor) -> None:
        """The backward of ``loss`` leaves the running statistics as it finds them: a checkpoint runs layers there."""
        if self._layers and loss.requires_grad:
            loss.register_hook(self._backward_begins)

    def _backward_begins(self, gradient: Tensor) -> None:
        run = torch._C._current_graph_task_id()
        if run != self._backward:  # two losses may have one backward
            self._backward = run
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._restoring("backward"))

    def snapshot(self) -> Callable[[], None]:
        """A function that puts the running statistics back as they are now, until the next snapshot is taken."""
        return self._restoring("step") if self._layers else _nothing

    def _restoring(self, use: str) -> Callable[[], None]:
        """A function that puts the running statistics back as they are now, until the next copy for this ``use``.

        To put them back does not count as a change of them: a backward that is to come may need them.
        """
        pairs = self._copied(use)

        def restore() -> None:
            with torch.no_grad():
                for buffers, copies in pairs:
                    torch._foreach_copy_([buffer.data for buffer in buffers], copies)

        return restore

    def _copied(self, use: str) -> list[tuple[list[Tensor], list[Tensor]]]:
        """The running statistics of layers in training mode, and copies of them.

        One copy of all buffers of a type and device at once, into memory that is kept: a launch for each of a hundred
        buffers would cost a GPU's host more than small steps take.
        """
        groups: dict[_Group, list[Tensor]] = {}
        for module in self._layers:
            if module.training:
                for buffer in module.buffers(recurse=False):
                    groups.setdefault((use, buffer.dtype, buffer.device), []).append(buffer)
        pairs = [(buffers, self._copies(group, buffers)) for group, buffers in groups.items()]
        with torch.no_grad():
            for buffers, copies in pairs:
                torch._foreach_copy_([copy.data for copy in copies], buffers)  # no change: a graph may hold the copy
        return pairs

    def _copies(self, group: _Group, buffers: list[Tensor]) -> list[Tensor]:
        kept = self._kept.get(group, [])
        if [copy.shape for copy in kept] != [buffer.shape for buffer in buffers]:
            kept = self._kept[group] = [torch.empty_like(buffer) for buffer in buffers]
        return kept


def _nothing() -> None:
    """There is nothing to put back."""


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
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Each buffer is the tensor that it was, with the values that it had, whether it was written to or bound anew.

    To put a value back does not count as a change of the buffer: a backward that is to come may need it.
    """
    owners = [(owner, name, x) for owner in model.modules() for name, x in owner._buffers.items() if x is not None]
    values = [None if x.is_inference() else x.clone() for _, _, x in owners]
    try:
        yield
    finally:
        for (owner, name, buffer), value in zip(owners, values, strict=True):
            owner._buffers[name] = buffer
            if value is not None:
                with torch.no_grad():
                    buffer.data.copy_(value)


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
