"""Which parts of a minibatch have one entry a sample, and how the entries of some samples are taken.

Tensors have the samples in dim 0. Dicts, named tuples and dataclasses are structure: each of their parts is looked at.
So is a list or tuple, unless it has n entries and its tensors have not n rows each: then it is a sequence of samples,
such as n strings, n ragged tensors or n dicts of boxes. A list, array or number of another length is a constant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from selbp._numpy import ARRAYS, FLOATS

_CONSTANT = (str, bytes, bytearray, Number, type(None), torch.Size, type)


class Listed(list[Any]):
    """A list known to have one entry a sample, whatever its tensors look like: some of a list that had."""


class ListedTuple(tuple[Any, ...]):
    """The same of a tuple."""


def listed(entries: Any) -> Any:
    """``entries``, which have one entry a sample, so that they are taken for that from now on."""
    if isinstance(entries, tuple):
        return ListedTuple(entries)
    return Listed(entries) if isinstance(entries, list) else entries


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with ``function`` applied to every tensor that has rows; everything else is passed through."""
    if isinstance(tree, Tensor):
        return function(tree) if tree.dim() else tree
    return rebuilt(tree, lambda part: map_tensors(part, function)) if _is_structure(tree) else tree


def map_samples(tree: Any, n: int, tensors: Callable[[Tensor], Any], entries: Callable[[Any], Any]) -> Any:
    """``tree`` with ``tensors`` applied to every tensor that has rows, and ``entries`` to every sequence of n samples.

    Constants are passed through. Raises ValueError where a sequence of n entries may be either, and TypeError for an
    object that holds samples in a way of its own.
    """
    if isinstance(tree, Tensor):
        return tensors(tree) if tree.dim() else tree
    if isinstance(tree, _CONSTANT):
        return tree
    refuse_packed(tree)
    if _is_structure(tree) and not _is_samples(tree, n):
        return rebuilt(tree, lambda part: map_samples(part, n, tensors, entries))
    if _is_sequence(tree):
        return entries(tree) if len(tree) == n else tree
    _refuse_object(tree, n)
    return tree


def _is_structure(tree: Any) -> bool:
    return isinstance(tree, (Mapping, tuple, list)) or (dataclasses.is_dataclass(tree) and not isinstance(tree, type))


def _is_sequence(tree: Any) -> bool:
    return isinstance(tree, Sequence) or (isinstance(tree, ARRAYS) and tree.ndim > 0)


def _parts(tree: Any) -> list[Any]:
    """What a structure is made of."""
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, (tuple, list)):
        return list(tree)
    return [getattr(tree, field.name) for field in dataclasses.fields(tree)]


def rebuilt(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A structure of the same kind, ``function`` applied to its parts."""
    if isinstance(tree, Mapping):
        return {key: function(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        parts = [function(value) for value in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    settable = [field.name for field in dataclasses.fields(tree) if field.init]
    return dataclasses.replace(tree, **{name: function(getattr(tree, name)) for name in settable})


def _is_samples(tree: Any, n: int) -> bool:
    """Whether a structure is a sequence of n samples. Raises ValueError where it may be either."""
    if not isinstance(tree, (tuple, list)) or isinstance(tree, torch.Size) or hasattr(tree, "_fields"):
        return False
    if len(tree) != n:
        return False
    if isinstance(tree, (Listed, ListedTuple)):
        return True
    as_structure = _all_rows_of(tree, n)
    if as_structure is False:
        return True
    if as_structure is None:
        if isinstance(tree, tuple) and n > 1 and all(isinstance(part, Number) for part in tree):
            raise ValueError(
                f"the batch holds a tuple of {n} numbers and has {n} samples: it may be one number a sample or a "
                "constant. Pass the former as a tensor or a list; leave the latter out of the batch"
            )
        return True
    if n == 1 or (isinstance(tree, tuple) and all(isinstance(part, Tensor) for part in tree)):
        return False  # with one sample both readings take the same
    raise ValueError(
        f"the batch holds a {type(tree).__name__} of {n} entries that have {n} rows each, and {n} samples: it may be "
        f"one entry a sample, or {n} parts with the samples in dim 0. Stack the former into one tensor; pass the "
        "latter as a tuple of tensors or a dict"
    )


def _all_rows(tree: Any, n: int) -> bool | None:
    """Whether every tensor in ``tree`` has n rows, or is in a sequence of n; None where it holds neither."""
    if isinstance(tree, Tensor):
        return tree.shape[0] == n if tree.dim() else None
    if isinstance(tree, _CONSTANT):
        return None
    if _is_sequence(tree) and len(tree) == n:
        return True
    return _all_rows_of(tree, n) if _is_structure(tree) else None


def _all_rows_of(structure: Any, n: int) -> bool | None:
    """The same of a structure's parts."""
    found = {_all_rows(part, n) for part in _parts(structure)} - {None}
    return False not in found if found else None


def _refuse_object(tree: Any, n: int) -> None:
    """Raise TypeError where an object of another type seems to hold one entry a sample."""
    parts = getattr(tree, "__dict__", {}).values() if not isinstance(tree, torch.nn.Module) else ()
    holds = any(isinstance(part, Tensor) and part.dim() and part.shape[0] == n for part in parts)
    if holds or (hasattr(tree, "__len__") and len(tree) == n):
        raise TypeError(
            f"the batch holds a {type(tree).__name__}, from which the chosen samples cannot be taken: pass a tensor, "
            "list or array with one entry a sample, or a tuple, dict or dataclass of them"
        )


def refuse_packed(tree: Any) -> None:
    """Raise TypeError for a :class:`PackedSequence`, which is a named tuple of tensors."""
    if isinstance(tree, PackedSequence):
        raise TypeError(
            "the batch holds a PackedSequence, whose rows are time steps of several samples: pass the padded tensor "
            "and the lengths, and pack them inside the model"
        )


def refuse_layout(x: Tensor) -> None:
    """Raise TypeError for a nested or sparse tensor, whose rows are not taken by index."""
    if x.is_nested:
        raise TypeError("the batch holds a nested tensor: pass a list of n tensors, or a padded one and the lengths")
    if x.layout != torch.strided:
        raise TypeError(f"the batch holds a tensor of layout {x.layout}: pass a dense one, whose rows can be taken")


def sizes(inputs: Any, target: Any) -> list[int]:
    """The numbers of samples that a batch may have, most likely first; empty where it holds no samples.

    A tensor that the model or the loss is given as it is tells. Else the first sequence or tensor inside a list or
    tuple does; both are listed where they differ.
    """
    direct = _direct(inputs, nested=True) or _direct(target, nested=False)
    if direct:
        return direct[:1]
    parts = _parts(inputs) if _is_structure(inputs) else [inputs]
    found: list[int] = []

    def rows(x: Tensor) -> Tensor:
        found.append(x.shape[0])
        return x

    for part in [*parts, target]:
        map_tensors(part, rows)
        if _is_sequence(part) and not isinstance(part, _CONSTANT):
            found.append(len(part))
    candidates = list(dict.fromkeys(found))
    fitting = [n for n in candidates if all(_all_rows(part, n) is not False for part in [*parts, target])]
    return fitting or candidates[:1]


def _direct(tree: Any, nested: bool) -> list[int]:
    """Rows of the tensors in ``tree``, through dicts, and through one tuple or list where ``nested``."""
    if isinstance(tree, Tensor):
        return [tree.shape[0]] if tree.dim() else []
    if isinstance(tree, Mapping) or (nested and isinstance(tree, (tuple, list))):
        return [rows for part in _parts(tree) for rows in _direct(part, False)]
    return []


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``x`` in its own memory format (``index_select`` would turn channels-last into NCHW)."""
    return x.index_select(0, indices) if x.is_contiguous() else x[indices]


def take_entries(entries: Any, indices: list[int], live: list[bool]) -> Any:
    """The samples ``indices`` of a sequence; where not ``live``, floating values become 0."""
    if isinstance(entries, ARRAYS):
        taken = entries[indices]
        if taken.dtype.kind == "f":
            taken[[not alive for alive in live]] = 0
        return taken
    chosen = [entries[i] if alive else _blank(entries[i]) for i, alive in zip(indices, live, strict=True)]
    return tuple(chosen) if isinstance(entries, tuple) else chosen


def _blank(entry: Any) -> Any:
    """``entry`` with zeros in place of floating values."""
    if isinstance(entry, Tensor):
        return torch.zeros_like(entry) if entry.is_floating_point() else entry
    if isinstance(entry, ARRAYS):
        blank = entry.copy()
        if entry.dtype.kind == "f":
            blank[...] = 0
        return blank
    if isinstance(entry, FLOATS):
        return type(entry)(0.0)
    return rebuilt(entry, _blank) if _is_structure(entry) and not isinstance(entry, torch.Size) else entry


def finite_entry(entry: Any) -> Any:
    """Whether every floating value of one sample's entry is finite: a bool, or a () tensor on the entry's device."""
    if isinstance(entry, Tensor):
        return torch.isfinite(entry.detach()).all() if entry.is_floating_point() else True
    if isinstance(entry, ARRAYS):
        return bool((abs(entry) < math.inf).all()) if entry.dtype.kind == "f" else True
    if isinstance(entry, FLOATS):
        return math.isfinite(entry)
    result: Any = True
    for part in _parts(entry) if _is_structure(entry) and not isinstance(entry, torch.Size) else ():
        found = finite_entry(part)
        result = found if result is True else result & found if found is not True else result
    return result
