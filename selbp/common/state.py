"""What a step remembers from one minibatch to the next: the selector's memory, its draws, and the steps counted."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from selbp._checks import check_entries, shown
from selbp.common.buffers import Key, kinds_of
from selbp.common.samples import map_tensors
from selbp.selectors import Selector

CHOICE_ENTRIES = ("selector_type", "selector", "generator")
COUNT_ENTRIES = ("optimizer_step", "auto_advance", "backward", "classes_last", "buffers")


class Counts(NamedTuple):
    """Counts, decisions and observations of a step."""

    steps: int
    auto_advance: bool
    backward: Literal["rows", "recompute"] | None
    classes_last: bool | None
    buffers: dict[Key, str]


def check_counts(state: Mapping[str, Any]) -> Counts:
    """Read the counts of a whole state. Raises ValueError."""
    if isinstance(state, Mapping) and "optimizer_step" in state:
        state = {"classes_last": None, "buffers": [], **state}  # states were saved without it
    check_entries("state", state, (*COUNT_ENTRIES, *CHOICE_ENTRIES))
    count, auto = state["optimizer_step"], state["auto_advance"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0 or not isinstance(auto, bool):
        raise ValueError(
            f"optimizer_step must be an int of at least 0 and auto_advance a bool, got {shown(count)} and {shown(auto)}"
        )
    if state["backward"] not in (None, "rows", "recompute"):
        raise ValueError(f'the state\'s backward must be "rows", "recompute" or None, got {shown(state["backward"])}')
    if not isinstance(state["classes_last"], (bool, NoneType)):
        raise ValueError(f"the state's classes_last must be a bool or None, got {shown(state['classes_last'])}")
    return Counts(count, auto, state["backward"], state["classes_last"], kinds_of(state["buffers"]))


class ChoiceState:
    """The selector's memory and the generator that it draws from, saved and restored together."""

    def __init__(self, selector: Selector, generator: torch.Generator | None) -> None:
        self._selector, self._generator = selector, generator

    @property
    def remembers(self) -> bool:
        """Whether there is anything to save: a generator of its own, or a rule with memory."""
        return self._generator is not None or bool(self._selector.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The entries :data:`CHOICE_ENTRIES`, with tensors of their own."""
        return {
            "selector_type": type(self._selector).__name__,
            "selector": _copy(self._selector.state_dict()),
            "generator": None if self._generator is None else self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        mine, generator = type(self._selector).__name__, state["generator"]
        if state["selector_type"] != mine:
            raise ValueError(f"state is of a {state['selector_type']}, the selector is a {mine}")
        if (generator is None) != (self._generator is None):
            has = {True: "none", False: "one"}
            raise ValueError(
                f"the state holds {has[generator is None]} of a generator's, and generator= gave "
                f"{has[self._generator is None]} here: pass a generator to both or to neither"
            )
        if self._generator is not None:
            try:
                torch.Generator(self._generator.device).set_state(generator)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"the state's generator does not fit {self._generator.device}: {error}") from error
        self._selector.load_state_dict(_copy(state["selector"]))
        if self._generator is not None:
            self._generator.set_state(generator)

    def snapshot(self) -> Callable[[], None]:
        """A function that puts selector and generator back as they are now."""
        saved = self.state_dict()
        return lambda: self.load_state_dict(saved)


def load_all(what: str, parts: Mapping[str, Any], states: Any) -> None:
    """Have each of ``parts`` take over its entry of ``states``; where one refuses, all are put back. Raises ValueError.

    ``what`` is the name of ``states``.
    """
    check_entries(what, states, parts)
    before = {name: part.state_dict() for name, part in parts.items()}
    try:
        for name, part in parts.items():
            part.load_state_dict(states[name])
    except BaseException:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        raise


def pack(state: Mapping[str, Any]) -> Tensor:
    """A state as one uint8 tensor (bytes,) on the CPU, which every format of checkpoints holds.

    Equal kinds of state give equal sizes: formats that load in place need that.
    """
    file = io.BytesIO()
    torch.save(map_tensors(state, lambda x: x.detach().cpu()), file)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack(packed: Any) -> dict[str, Any]:
    """What :func:`pack` was given: tensors and plain values, nothing else is read. Raises ValueError."""
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"the state must be a uint8 tensor (bytes,), got {shown(packed)}")
    try:
        state = torch.load(io.BytesIO(packed.cpu().numpy().tobytes()), weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"the state does not read as a rule's state of tensors and numbers: {error}") from error
    check_entries("the state", state, CHOICE_ENTRIES)
    return dict(state)


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with tensors of its own."""
    copied: dict[str, Any] = map_tensors(state, lambda x: x.clone())
    return copied
