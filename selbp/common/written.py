"""Buffers that a training forward writes beside running statistics, and how a second forward runs from what they were.

Examples are the vectors of spectral normalisation, call counters, quantisation observers and codebooks. The forward of
the chosen rows must compute what the forward that scored did, so it starts from what that one started from. What it
writes itself is discarded: the scoring forward has seen all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from selbp.common.distributed import buffers_synchronised
from selbp.common.in_place import version_of
from selbp.ops._backends import capturing

_ABSENT: Any = object()  # in place of a buffer that a module has not


# How forwards treat a buffer. UNSEEN: they write to it, and neither its version nor its identity shows that.
STAYS, WRITTEN, UNSEEN = "stays", "written", "unseen"
_Key = tuple[int, str, bool]  # the module's place in the list, the buffer's name, and the module's mode


class _Mark(NamedTuple):
    """A buffer as it was before a forward."""

    tensor: Tensor | None
    version: int  # -1: it has no memory yet
    copy: Tensor | None  # of its values, unless it is known to stay


class _Change(NamedTuple):
    """A buffer that a forward has written to, or bound anew, as it was before."""

    module: nn.Module
    name: str
    tensor: Tensor | None
    value: Tensor | None  # a copy where the tensor itself was written to; else the tensor


class Written:
    """The writes of one scoring forward. Call :meth:`end` when it has run."""

    def __init__(self, buffers: WrittenBuffers) -> None:
        self._buffers, self._marks = buffers, buffers.marks()
        self._changes: list[_Change] | None = None

    def end(self) -> list[_Change]:
        """Find, once, what has been written since this was made."""
        if self._changes is None:
            self._changes = self._buffers.changes(self._marks)
            self._marks = []
        return self._changes

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, modules have copies of what their buffers were before, and write to these."""
        changes = self.end()
        with buffers_synchronised(self._buffers.model):
            now = [(change, change.module._buffers.get(change.name, _ABSENT)) for change in changes]
            copies: dict[int, Tensor] = {}  # a buffer of two modules is one
            for change in changes:
                _bind(change, _fresh(change, copies))
            try:
                yield
            finally:
                for change, buffer in now:
                    _bind(change, buffer)

    def kept_in_backward(self, loss: Tensor) -> None:
        """The backward of ``loss`` leaves what was written as it finds it: a checkpoint runs modules there."""
        if (changes := self.end()) and loss.requires_grad:
            loss.register_hook(lambda gradient: self._buffers.keep_in_this_backward(changes))

    def undo(self) -> None:
        """Each buffer is the tensor that it was before, with the values that it had."""
        for change in self.end():
            _bind(change, change.tensor)
            if change.tensor is not change.value and change.tensor is not None and change.value is not None:
                change.tensor.data.copy_(change.value)


class WrittenBuffers:
    """The buffers of ``model`` beside the running statistics of torch's own norm layers.

    A write shows in a buffer's version, or as another tensor in its place, so nothing waits for the device. Some
    operators, batch norm's among them, write without a trace, so the first step compares values as well. What a buffer
    was is copied in the first step, and later only if it has been seen to change. One that changes for the first time
    later runs, in that step, from what the scoring forward made of it.
    """

    def __init__(self, model: nn.Module) -> None:
        apart = {id(module) for module in model.modules() if _is_torch_norm(module)}
        for module in model.modules():
            if type(module).__module__.startswith("torch.ao."):  # a fused convolution reads its norm's statistics
                apart -= {id(part) for part in module.modules()}
        self.model = model
        self._modules = [m for m in model.modules() if id(m) not in apart and not isinstance(m, ScriptModule)]
        self._known: dict[_Key, str] = {}
        self._backward = -1  # the engine's run that leaves them as they are

    @contextmanager
    def followed(self) -> Iterator[Written]:
        """Around a step whose scoring forward comes first. Where anything is raised, that forward is undone."""
        written = Written(self)
        try:
            yield written
        except BaseException:
            written.undo()
            raise

    def marks(self) -> list[dict[str, _Mark] | None]:
        """Each module's buffers as they are now; None for a module without."""
        return [self._marks_of(i, module) if module._buffers else None for i, module in enumerate(self._modules)]

    def _marks_of(self, place: int, module: nn.Module) -> dict[str, _Mark]:
        marks = {}
        for name, x in module._buffers.items():
            if x is None or (type(x) is not Tensor and is_lazy(x)):
                marks[name] = _Mark(x, 0 if x is None else -1, None)
                continue
            stays = self._known.get((place, name, module.training)) == STAYS
            marks[name] = _Mark(x, version_of(x), None if stays else x.detach().clone())
        return marks

    def changes(self, before: list[dict[str, _Mark] | None]) -> list[_Change]:
        """Find what has changed since ``before``, and remember which buffers have not."""
        found = []
        for place, (module, marks) in enumerate(zip(self._modules, before, strict=True)):
            if marks is None and not module._buffers:
                continue
            marks = marks or {}
            for name, mark in marks.items():
                x, key = module._buffers.get(name, _ABSENT), (place, name, module.training)
                if mark.version < 0:
                    continue
                edited = mark.tensor is not None and version_of(mark.tensor) != mark.version
                known = self._known.get(key)
                if known == UNSEEN or (known is None and not edited and x is mark.tensor and _differ(x, mark.copy)):
                    self._known[key], edited = UNSEEN, True
                elif edited or x is not mark.tensor:
                    self._known[key] = WRITTEN
                else:
                    self._known.setdefault(key, STAYS)
                    continue
                value = mark.copy if edited and mark.copy is not None else mark.tensor
                if x is not mark.tensor or _alike(x, value):  # else it was moved as a whole, and is no value of it
                    found.append(_Change(module, name, mark.tensor, value))
            found += [_Change(module, name, _ABSENT, _ABSENT) for name in module._buffers if name not in marks]
        return found

    def keep_in_this_backward(self, changes: Iterable[_Change]) -> None:
        """When the backward that runs now ends, they are what they are now."""
        run = torch._C._current_graph_task_id()
        if run == self._backward:  # two losses may have one backward
            return
        self._backward = run
        now = [(change, change.module._buffers.get(change.name, _ABSENT)) for change in changes]
        values = [x.detach().clone() if isinstance(x, Tensor) else None for _, x in now]

        def restore() -> None:
            for (change, x), value in zip(now, values, strict=True):
                _bind(change, x)
                if value is not None:
                    x.data.copy_(value)

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(restore)


def _is_torch_norm(module: nn.Module) -> bool:
    """Whether it is a norm layer of torch itself, whose training forward does not read its running statistics."""
    return isinstance(module, _NormBase) and type(module).__module__.startswith("torch.nn.modules.")


def _differ(x: Tensor | None, copy: Tensor | None) -> bool:
    """Whether values differ. Waits for the device; in a capture, which must not, and where it cannot be told, False."""
    if x is None or copy is None or capturing(x.device):
        return False
    try:
        return not torch.equal(x, copy)
    except (RuntimeError, TypeError):  # no such operator for tensors of this kind
        return False


def _alike(x: Tensor | None, value: Tensor | None) -> bool:
    return x is not None and value is not None and x.dtype == value.dtype and x.device == value.device


def _fresh(change: _Change, copies: dict[int, Tensor]) -> Tensor | None:
    """A copy of what the buffer was, to be written to; itself where it has a graph, or is no tensor."""
    value = change.value
    if not isinstance(value, Tensor) or is_lazy(value) or value.requires_grad:
        return value
    return copies.setdefault(id(change.tensor), value.clone())


def _bind(change: _Change, buffer: Tensor | None) -> None:
    """Make ``buffer`` the module's, in the place of the one that changed."""
    if buffer is _ABSENT:
        change.module._buffers.pop(change.name, None)
    else:
        change.module._buffers[change.name] = buffer
