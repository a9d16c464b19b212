"""Which parts of a step's arguments are the target, which have no samples, and in which dim the others have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from selbp._checks import check_flag, check_int, shown
from selbp.common.samples import map_tensors

Key = str | int  # an entry of a dict batch by name, of a tuple by position


@dataclass(frozen=True)
class Places:
    """How the arguments of a call become samples in dim 0, and back into what the model is called with."""

    shared: tuple[Key, ...] = ()  # entries that the model gets whole, whatever rows it runs on
    dims: Mapping[Key, int] = field(default_factory=dict)  # where the samples of an entry are, if not in dim 0
    target_keys: tuple[str, ...] = ("labels",)  # the entries of a dict batch that are the target
    pass_target: bool = False  # whether the model is given them too

    @classmethod
    def of(cls, shared: Any, batch_dims: Any, target_keys: Any, pass_labels: Any) -> Places:
        """Check the options of a step. Raises TypeError or ValueError that names the option."""
        names = _names("shared", shared, (str, int))
        if batch_dims is not None and not isinstance(batch_dims, Mapping):
            raise TypeError(f"batch_dims must be a dict {{name or position: dim}} or None, got {shown(batch_dims)}")
        dims = dict(batch_dims or {})
        keys = _names("batch_dims", dims, (str, int))
        if both := [key for key in keys if key in names]:
            raise ValueError(f"{both[0]!r} is in shared, which says that it has no samples, and in batch_dims")
        dims = {key: check_int(f"batch_dims[{key!r}]", dim, None, "an int (a dim)") for key, dim in dims.items()}
        targets = ("labels",) if target_keys is None else _names("target_keys", target_keys, (str,))
        if not targets:
            raise ValueError("target_keys must name at least one entry of the batch, got none")
        made = cls(names, dims, tuple(map(str, targets)), check_flag("pass_labels", pass_labels))
        return PLAIN if made == PLAIN else made

    @property
    def plain(self) -> bool:
        """Whether every entry has its samples in dim 0."""
        return not self.shared and not self.dims

    def take_target(self, inputs: Mapping[Any, Any]) -> tuple[dict[Any, Any], Any]:
        """A dict batch without its target, and the target: one entry, or a dict of several. None where it has none."""
        rest = dict(inputs)
        missing = [name for name in self.target_keys if rest.get(name) is None]
        if missing and (len(self.target_keys) > 1 or self.target_keys != ("labels",)):
            has = ", ".join(map(repr, rest))
            raise ValueError(f"target_keys: the batch has no {', '.join(map(repr, missing))}; it has {has}")
        found = {name: rest.get(name) for name in self.target_keys}
        if not self.pass_target:
            for name in self.target_keys:
                rest.pop(name, None)
        return rest, found if len(found) > 1 else next(iter(found.values()))

    def split(self, inputs: Any) -> tuple[Any, dict[Key, Any]]:
        """``inputs`` with the samples in dim 0, None in place of what is shared, and what is shared."""
        if self.plain:
            return inputs, {}
        entries = _entries(inputs)
        for name, keys in (("shared", self.shared), ("batch_dims", tuple(self.dims))):
            if wrong := [key for key in keys if key not in entries]:
                has = ", ".join(map(repr, entries))
                raise ValueError(f"{name}: the batch has no {wrong[0]!r}; it has {has}")
        if len(self.shared) == len(entries):
            raise ValueError("shared names every entry of the batch: one at least must have samples")
        held = {key: entries[key] for key in self.shared}
        for key in self.shared:
            entries[key] = None
        for key, dim in self.dims.items():
            entries[key] = _moved(entries[key], key, dim)
        return _with_entries(inputs, entries), held

    def join(self, inputs: Any, held: Mapping[Key, Any]) -> Any:
        """What the model is called with: the inverse of :meth:`split`, for any rows."""
        if self.plain:
            return inputs
        entries = {**_entries(inputs), **held}
        for key, dim in self.dims.items():
            entries[key] = map_tensors(entries[key], partial(_back, dim=dim))
        return _with_entries(inputs, entries)


PLAIN = Places()


def _names(option: str, value: Any, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """The names in an option, as a tuple; a name alone is one. Raises TypeError."""
    if value is None:
        return ()
    if isinstance(value, kinds) and not isinstance(value, bool):
        return (value,)
    what = "names" if kinds == (str,) else "names (of a dict batch) or positions (of a tuple)"
    entries = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (Tensor, str)) else None
    if entries is None or any(not isinstance(entry, kinds) or isinstance(entry, bool) for entry in entries):
        raise TypeError(f"{option} must hold {what}, got {shown(value)}")
    return entries


def _entries(inputs: Any) -> dict[Key, Any]:
    """The entries of the outermost dict or tuple; a tensor alone is entry 0."""
    if isinstance(inputs, Tensor):
        return {0: inputs}
    return dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))


def _with_entries(inputs: Any, entries: Mapping[Any, Any]) -> Any:
    if isinstance(inputs, Tensor):
        return entries[0]
    return dict(entries) if isinstance(inputs, Mapping) else tuple(entries[i] for i in range(len(inputs)))


def _moved(entry: Any, key: Key, dim: int) -> Any:
    """The tensors of ``entry`` with ``dim`` first. Raises ValueError where a tensor has no such dim."""

    def move(x: Tensor) -> Tensor:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"batch_dims[{key!r}] = {dim}, but the entry has a tensor of shape {tuple(x.shape)}")
        return x.movedim(dim, 0)

    return map_tensors(entry, move)


def _back(x: Tensor, dim: int) -> Tensor:
    """``x`` with dim 0 back at ``dim``, in the memory order that the model is used to."""
    return x.movedim(0, dim).contiguous()
