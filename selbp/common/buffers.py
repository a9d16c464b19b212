"""A model's buffers, put back: after a look ahead, where a step raises, and for a second forward of the step.

Examples are running statistics, the vectors of spectral normalisation, call counters, quantisation observers and
codebooks. The forward of the chosen rows must compute what the forward that scored did, so it starts from what that one
started from. What it writes itself is discarded: the scoring forward has seen all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from selbp._checks import shown
from selbp._torch import version_of
from selbp.common.distributed import buffers_synchronised
from selbp.ops._backends import capturing
from selbp.rows.engine import current_task, when_backward_ends

_ABSENT: Any = object()  # in place of a buffer that a module has not
_SMALL = 2**16  # elements: to copy more takes longer than to launch the copy

# How forwards treat a buffer. UNSEEN: they write to it, and neither its version nor its identity shows that. QUIET:
# neither has changed, and values have not been compared.
KINDS = STAYS, QUIET, WRITTEN, UNSEEN = "stays", "quiet", "written", "unseen"
Key = tuple[int, str, bool]  # the module's place in the list, the buffer's name, and the module's mode


class _Values:
    """Copies of tensors. Small ones of a type and device are copied into one piece of memory, by one launch.

    A launch for each of a hundred buffers would cost a GPU's host more than small steps take.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._shapes = [torch.Size() if x.is_nested else x.shape for x in tensors]
        alike: dict[Any, list[int]] = {}
        for i, x in enumerate(tensors):
            kind = (x.dtype, x.device, type(x), x.layout, x.dim() == 0, x.numel() <= _SMALL and not x.is_nested)
            alike.setdefault(kind, []).append(i)
        self._copies: list[tuple[list[int], Tensor]] = []  # places in ``tensors``, and a copy of these
        with torch.no_grad():
            for (*_, kind, layout, _, small), places in alike.items():
                of = [tensors[i] for i in places]
                if len(of) > 1 and small and kind is Tensor and layout == torch.strided and not of[0].is_quantized:
                    self._copies.append((places, torch._utils._flatten_dense_tensors(of)))
                else:
                    self._copies += [([i], tensors[i].detach().clone()) for i in places]

    def _parts(self, places: list[int], copy: Tensor) -> list[Tensor]:
        """A copy as the tensors of which it is, not to be written to: they share memory."""
        if len(places) == 1:
            return [copy]
        if not self._shapes[places[0]]:
            return [*copy.unbind()]
        shapes = [self._shapes[i] for i in places]
        parts = copy.split([shape.numel() for shape in shapes])
        return [part if len(shape) == 1 else part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def keep(self, places: Sequence[int]) -> None:
        """Let go of what holds none of ``places``."""
        self._copies = [(group, copy) for group, copy in self._copies if not {*group}.isdisjoint(places)]

    def each(self) -> list[Any]:
        """The copies that are kept, in memory of their own, with the type and device that their tensors have now."""
        found: list[Any] = [None] * len(self._tensors)
        with torch.no_grad():
            for places, copy in self._copies:
                parts = self._parts(places, copy)
                own = [copy.clone()] if len(places) == 1 else [torch.empty_like(part) for part in parts]
                if len(places) > 1:
                    torch._foreach_copy_(own, parts)
                for i, x in zip(places, own, strict=True):
                    now = self._tensors[i]
                    found[i] = x if x.dtype == now.dtype and x.device == now.device else x.to(now.device, now.dtype)
        return found

    def differ(self, places: Sequence[int]) -> set[int]:
        """The ``places`` whose tensors differ from their copies. Waits for the device; none in a capture, or where
        tensors cannot be compared.
        """
        wanted, found = {*places}, set()
        for group, copy in self._copies:
            if wanted.isdisjoint(group) or capturing(copy.device):  # a capture must not wait
                continue
            for i, value in zip(group, self._parts(group, copy), strict=True):
                try:
                    if i in wanted and not torch.equal(self._tensors[i], value):
                        found.add(i)
                except (RuntimeError, TypeError):  # no such operator for tensors of this kind
                    pass
        return found

    def put_back(self, places: Sequence[int] | None = None) -> None:
        """Write them to the tensors, all or those at ``places``.

        That does not count as a change of them: a backward that is to come may need them.
        """
        wanted = None if places is None else {*places}
        with torch.no_grad():
            for group, copy in self._copies:
                parts = zip(group, self._parts(group, copy), strict=True)
                pairs = [(self._tensors[i], part) for i, part in parts if wanted is None or i in wanted]
                for x, part in pairs:
                    if not x.is_nested and x.shape != part.shape:
                        x.resize_(part.shape)
                if len(pairs) > 1:
                    torch._foreach_copy_([x.data for x, _ in pairs], [part for _, part in pairs])
                elif pairs:
                    pairs[0][0].data.copy_(pairs[0][1])


# A buffer that a forward has written to, or bound anew, as it was: its module and name, the tensor, and the place of
# its values if the tensor itself was written to and they are known, else -1.
_Change = tuple[nn.Module, str, Tensor | None, int]


class _Mark(NamedTuple):
    """A buffer that a forward may write to, as it was before."""

    key: Key
    known: str | None
    module: nn.Module
    tensor: Tensor | None
    version: int
    value: int  # the place of its values; -1 if they were not copied


class Written:
    """The writes of one step. Call :meth:`end` when a forward that scores has run."""

    def __init__(self, buffers: Buffers, *, replays: bool) -> None:
        self._buffers, self._replays = buffers, replays
        self._sure: list[_Change] = []  # of buffers that are written in each forward
        self._marks: list[_Mark] = []  # of all others
        self._names: dict[int, tuple[str, ...]] = {}  # of the buffers of the module at a place
        self._changes: list[_Change] | None = None
        copied: list[Tensor] = []
        for place in range(len(buffers.modules)) if replays else buffers.holders:
            module = buffers.modules[place]
            if not module._buffers:
                continue
            self._names[place], training = (*module._buffers,), module.training
            if not training and place in buffers.norms:
                continue
            for name, x in module._buffers.items():
                if x is not None and type(x) is not Tensor and is_lazy(x):  # it has no memory yet
                    self._sure.append((module, name, x, -1))
                    continue
                key, value = (place, name, training), -1
                known = buffers.known.get(key)
                if not replays and known in (STAYS, QUIET):
                    continue
                if x is not None and known != STAYS and (replays or known is not None):
                    value = len(copied)
                    copied.append(x)
                if known == UNSEEN:
                    self._sure.append((module, name, x, value))
                else:
                    self._marks.append(_Mark(key, known, module, x, 0 if x is None else version_of(x), value))
        self._values = _Values(copied)
        if replays:
            buffers.holders = [*self._names]

    def end(self) -> list[_Change]:
        """Find, once, what has been written since this was made, and remember how forwards treat each buffer."""
        if self._changes is None:
            self._changes = [*self._sure, *self._seen(learns=True), *self._late()]
            sure = [mark.value for mark in self._marks if mark.known == WRITTEN]
            self._values.keep([value for *_, value in self._changes] + sure)
        return self._changes

    def _seen(self, *, learns: bool) -> list[_Change]:
        """Find changes of the buffers that do not change in each forward."""
        found, unknown = [], [mark.value for mark in self._marks if mark.known in (None, QUIET) and mark.value >= 0]
        differ = self._values.differ(unknown) if unknown else ()
        for key, known, module, tensor, version, value in self._marks:
            x = module._buffers.get(key[1], _ABSENT)
            edited = tensor is not None and version_of(tensor) != version
            if edited or x is not tensor:
                treated = WRITTEN
            elif known in (STAYS, WRITTEN):
                continue
            elif edited := value in differ:
                treated = UNSEEN
            else:
                treated = STAYS if value >= 0 or x is None else QUIET
            if learns and self._buffers.known.get(key) not in (WRITTEN, UNSEEN):  # by another forward of this step
                self._buffers.known[key] = treated
            if edited or x is not tensor:
                found.append((module, key[1], tensor, value if edited else -1))
        return found

    def _late(self) -> list[_Change]:
        """The buffers that modules did not have when this was made, where that was looked at."""
        if not self._replays:
            return []
        return [
            (module, name, _ABSENT, -1)
            for place, module in enumerate(self._buffers.modules)
            if module._buffers
            for name in module._buffers
            if name not in self._names.get(place, ())
        ]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, modules have copies of what their buffers were before, and write to these."""
        changes = self.end()
        with buffers_synchronised(self._buffers.model):
            now, values = _bound(changes), self._values.each()
            own: dict[int, Tensor | None] = {}  # a buffer of two modules is one
            _bind(changes, [own.setdefault(id(x), values[i] if i >= 0 else _fresh(x)) for _, _, x, i in changes])
            try:
                yield
            finally:
                _bind(changes, now)

    def kept_in_backward(self, loss: Tensor) -> None:
        """The backward of ``loss`` leaves what was written as it finds it: a checkpoint runs modules there."""
        buffers, changes = self._buffers, self.end()
        if changes and loss.requires_grad:
            loss.register_hook(lambda gradient: buffers.keep_in_this_backward(changes))

    def undo(self, *, learns: bool = False) -> None:
        """Each buffer is the tensor that it was before, with the values that it had."""
        changes = [*self._sure, *self._seen(learns=learns), *self._late()]
        _bind(changes, [tensor for _, _, tensor, _ in changes])
        self._values.put_back([value for *_, value in changes])

    def close(self) -> None:
        """The step is over, and nothing will be undone."""
        if self._replays:
            self.end()
        self._seen(learns=True)  # of a second forward, too
        self._marks = []


_KEPT: dict[int, set[tuple[int, str]]] = {}  # by running backward: the ids of modules, and buffers that it leaves


class Buffers:
    """The buffers of ``model``, and how its forwards treat them.

    A write shows in a buffer's version, or as another tensor in its place, so nothing waits for the device. Some
    operators, batch norm's among them, write without a trace: of norm layers that is known, and the first step with a
    second forward compares values of all other buffers. A buffer is copied in that step, and in later ones only if a
    step has changed it. One that changes for the first time later runs, in that step, from what the scoring forward
    made of it. A step without a second forward looks at modules that had a buffer before: others cost time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = [module for module in model.modules() if not isinstance(module, ScriptModule)]
        self.holders = [place for place, module in enumerate(self.modules) if module._buffers]
        self._norms_known: dict[Key, str] = {}
        self.norms: set[int] = set()  # the places of torch's own, which write nothing in evaluation mode
        for place, module in enumerate(self.modules):
            if isinstance(module, _NormBase) and module.track_running_stats:
                names = "running_mean", "running_var", "num_batches_tracked"
                self._norms_known.update({(place, name, True): UNSEEN for name in names})
                if type(module).__module__.startswith("torch.nn.modules."):
                    self.norms.add(place)
        self.known = dict(self._norms_known)

    def state(self) -> list[list[Any]]:
        """How forwards have been seen to treat them: a resumed run copies the same ones."""
        return [[*key, kind] for key, kind in self.known.items()]

    def load(self, kinds: Mapping[Key, str]) -> None:
        """Take over what :func:`kinds_of` read of a :meth:`state`."""
        self.known = {**self._norms_known, **kinds}

    @contextmanager
    def followed(self, *, replays: bool = True) -> Iterator[Written]:
        """Around a step. Where anything is raised, what it wrote is undone.

        ``replays``: a second forward in it may start from what the buffers were.
        """
        written = Written(self, replays=replays)
        try:
            yield written
        except BaseException:
            written.undo()
            raise
        written.close()

    def keep_in_this_backward(self, changes: Sequence[_Change]) -> None:
        """When the backward that runs now ends, they are what they are now."""
        if (task := current_task()) != -1:  # several losses, and steps of a model, may have one backward
            kept = _KEPT.setdefault(task, set())
            changes = [change for change in changes if (id(change[0]), change[1]) not in kept]
            kept.update((id(module), name) for module, name, *_ in changes)
        now = _bound(changes)
        values = _Values([x for x in now if isinstance(x, Tensor)])

        def restore() -> None:
            _KEPT.pop(task, None)
            _bind(changes, now)
            values.put_back()

        when_backward_ends(restore)


def kinds_of(state: object) -> dict[Key, str]:
    """Read what :meth:`Buffers.state` gave. Raises ValueError for anything else."""
    kinds: dict[Key, str] = {}
    for row in state if isinstance(state, list) else [state]:
        if not isinstance(row, (list, tuple)) or [*map(type, row)] != [int, str, bool, str] or row[3] not in KINDS:
            raise ValueError(f"the state's buffers must be lists [place, name, training, kind], got {shown(row)}")
        kinds[row[0], row[1], row[2]] = row[3]
    return kinds


def _fresh(tensor: Tensor | None) -> Tensor | None:
    """A copy of a buffer, to be written to; itself where it has a graph, or is no tensor with memory."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.requires_grad:
        return tensor
    return tensor.clone()


def _bound(changes: Sequence[_Change]) -> list[Tensor | None]:
    """Return the buffers that modules have now where something has changed."""
    return [module._buffers.get(name, _ABSENT) for module, name, _, _ in changes]


def _bind(changes: Sequence[_Change], buffers: Sequence[Tensor | None]) -> None:
    """Make ``buffers`` the modules'."""
    for (module, name, _, _), buffer in zip(changes, buffers, strict=True):
        if buffer is _ABSENT:
            module._buffers.pop(name, None)
        else:
            module._buffers[name] = buffer


@contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[None]:
    """Each buffer is the tensor that it was, with the values that it had; one that a forward has made is gone again."""
    before = [(module, dict(module._buffers.items())) for module in model.modules()]
    held = [x for _, buffers in before for x in buffers.values() if x is not None]
    values = _Values([x for x in held if not (x.is_inference() or (type(x) is not Tensor and is_lazy(x)))])
    try:
        yield
    finally:
        for module, buffers in before:
            for name in {*module._buffers.keys()} - buffers.keys():
                del module._buffers[name]
            for name, buffer in buffers.items():
                module._buffers[name] = buffer
        values.put_back()
