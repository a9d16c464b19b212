"""A minibatch as a step receives it: what the model is called with and the target, of n samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selbp._checks import shown
from selbp.common.packed import packed_message, signs_of, unpacked
from selbp.common.places import PLAIN, Key, Places
from selbp.common.samples import (
    finite_entry,
    listed,
    map_samples,
    map_tensors,
    rebuilt,
    refuse_layout,
    refuse_packed,
    sizes,
    take_entries,
    take_rows,
)
from selbp.ops._backends import saves_launches
from selbp.ops.minibatch import finite_rows, plain_finite_rows

_NOTHING: Mapping[Key, Any] = {}


@dataclass(frozen=True)
class Batch:
    """``n`` samples: what the model is called with, the target, and what the caller knows of each sample."""

    inputs: Any
    target: Any
    extras: Mapping[str, Tensor]
    n: int
    device: torch.device
    places: Places = PLAIN  # how the inputs, with the samples in dim 0, are put together for the model
    held: Mapping[Key, Any] = field(default_factory=dict)  # the inputs that have no samples

    @classmethod
    def of(cls, inputs: Any, target: Any, extras: Mapping[str, Any], places: Places = PLAIN) -> Batch:
        """Check a step's arguments. In a dict without a ``target``, ``"labels"`` is the target, or what places name.

        A packed row becomes one row a sequence. Raises TypeError or ValueError that names what is wrong, before
        anything has run.
        """
        if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
            raise TypeError(f"inputs must be a Tensor, a tuple or a dict of tensors, got {type(inputs).__name__}")
        if target is None and isinstance(inputs, Mapping):
            inputs, target = places.take_target(inputs)
        if target is None:
            raise ValueError(
                'target is missing: pass step(inputs, target), a dict batch with "labels", or target_keys=(name,), '
                "which names the entry that is the target"
            )
        refuse_packed(inputs)
        if places.plain:
            inputs, target = unpacked(inputs, target)
        inputs, held = (inputs, _NOTHING) if places is PLAIN else places.split(inputs)
        devices: list[torch.device] = []

        def note(x: Tensor) -> Tensor:
            refuse_layout(x)
            devices.append(x.device)
            return x

        map_tensors((inputs, target), note)
        candidates = sizes(inputs, target)
        if not devices or not candidates:
            raise ValueError("inputs and target hold no tensor with a batch dimension")
        if len(candidates) > 1:
            raise ValueError(
                f"the batch may have {' or '.join(map(str, candidates))} samples: its lists and their tensors both "
                "fit. Pass a tensor with one row a sample, the target for one"
            )
        batch = cls(inputs, target, extras, candidates[0], devices[0], places, held)
        batch._check()
        return batch

    def _check(self) -> None:
        n, held = self.n, []
        if n == 0:
            raise ValueError("inputs must have at least one sample, got a batch of 0")

        def check(x: Tensor) -> Tensor:
            held.append(True)
            if x.shape[0] != n:
                raise ValueError(_wrong_rows(x, self.inputs, n))
            return x

        def found(entries: Any) -> Any:
            held.append(True)
            return entries

        self._map_inputs(check, found)
        if n == 1 and (names := signs_of(self.inputs)):
            raise ValueError(packed_message(names))
        if not held:
            raise ValueError("inputs hold no tensor with a batch dimension, nor a list with one entry a sample")
        map_samples(self.target, n, check, found)
        for name, value in self.extras.items():
            if not isinstance(value, Tensor) or value.shape != (n,):
                raise ValueError(f"{name} must be a tensor (n,) = ({n},), one entry per sample, got {shown(value)}")

    def _map(self, tensors: Any, entries: Any) -> tuple[Any, Any]:
        """Inputs and target, mapped."""
        return self._map_inputs(tensors, entries), map_samples(self.target, self.n, tensors, entries)

    def _map_inputs(self, tensors: Any, entries: Any) -> Any:
        """The inputs, mapped: their outermost tuple, list or dict is the model's arguments, never a list of samples."""
        if isinstance(self.inputs, Tensor):
            return map_samples(self.inputs, self.n, tensors, entries)
        return rebuilt(self.inputs, lambda part: map_samples(part, self.n, tensors, entries))

    def rows(self, indices: Tensor | None, finite: Tensor) -> Batch:
        """The samples ``indices`` (k,) (all, in order, for None); where not ``finite`` (k,), floating entries become 0.

        No weight of 0 keeps a sample's NaN out of a sum over rows. Lists are on the host: where the batch holds one,
        the indices and ``finite`` are read there.
        """
        host: list[tuple[list[int], list[bool]]] = []
        broken = ~finite if saves_launches(finite.device) else None  # a where launches a fill for its 0, once an entry

        def blanked(x: Tensor) -> Tensor:
            x = x if indices is None else take_rows(x, indices)
            if not x.is_floating_point():
                return x
            if broken is None:
                return torch.where(finite.view(-1, *[1] * (x.dim() - 1)), x, 0)
            return x.masked_fill(broken.view(-1, *[1] * (x.dim() - 1)), 0)

        def some(entries: Any) -> Any:
            if not host:
                host.append((list(range(self.n)) if indices is None else indices.tolist(), finite.tolist()))
            return take_entries(entries, *host[0])

        return self._some(len(finite), *self._map(blanked, some))

    def take(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (k,), without what the caller knows of each."""

        def rows(x: Tensor) -> Tensor:
            return take_rows(x, indices)

        def some(entries: Any) -> Any:
            return listed(take_entries(entries, indices.tolist(), [True] * len(indices)))

        return self._some(len(indices), *self._map(rows, some))

    def mapped(self, n: int, tensors: Any, entries: Any) -> Batch:
        """``n`` samples: what ``tensors`` and ``entries`` make of the tensors with rows and of the lists of samples."""
        return self._some(n, *self._map(tensors, entries))

    def _some(self, n: int, inputs: Any, target: Any) -> Batch:
        return Batch(inputs, target, {}, n, self.device, self.places, self.held)

    def finite(self) -> Tensor:
        """(n,) bool: every floating entry of the sample's inputs and target is finite."""
        result: Tensor | None = None
        fused = saves_launches(self.device)

        def both(found: Tensor) -> None:
            nonlocal result
            result = found if result is None else result & found

        def check(x: Tensor) -> Tensor:
            if x.is_floating_point() and x.numel():
                x = x.detach()
                both(finite_rows(x) if fused else plain_finite_rows(x))
            return x

        def look(entries: Any) -> Any:
            found = [finite_entry(entry) for entry in entries]
            if any(flag is not True for flag in found):
                both(torch.stack([torch.as_tensor(flag, device=self.device) for flag in found]))
            return entries

        self._map(check, look)
        return torch.ones(self.n, dtype=torch.bool, device=self.device) if result is None else result

    def feed(self, model: nn.Module) -> Any:
        """Call the model: ``model(x)``, ``model(*tuple)`` or ``model(**dict)``."""
        inputs = self.inputs if self.places is PLAIN else self.places.join(self.inputs, self.held)
        if isinstance(inputs, Tensor):
            return model(inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs)


def _wrong_rows(x: Tensor, inputs: Any, n: int) -> str:
    message = f"every tensor of the batch must have n = {n} rows, got one of {tuple(x.shape)}"
    if names := signs_of(inputs):
        return f"{packed_message(names)}; {message}"
    if isinstance(inputs, list) and len(inputs) > 1 and not isinstance(inputs[0], Mapping):
        message += ". A list is the model's arguments: where it holds the samples, pass step((samples,), target)"
    elif isinstance(inputs, (Mapping, tuple)):
        entries = inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs)
        name = next((name for name, entry in entries if entry is x), None)
        if name is not None:
            message += f", {name!r}: where it holds no samples pass shared=({name!r},), where they are in another dim "
            message += f"batch_dims={{{name!r}: dim}}"
    return message
