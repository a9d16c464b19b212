"""A module watched for the length of one forward, also where ``torch.compile`` has compiled the model before.

Dynamo leaves the guards on a module's *empty* dicts of hooks out: code that was compiled without a hook is run again
when there is one, and the hook is never called. It does guard on whether a module has a ``forward`` of its own. So a
module that is watched gets one, its class's own, for as long: that is another guarded state, compiled once.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

COMPILED = (
    "; parts of the model run under torch.compile, whose code leaves the module out: build the step before the "
    "model first runs, or call torch.compiler.reset() after building it"
)
Watcher = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]  # (args, kwargs, output) -> output


@dataclass
class _Watched:
    """What is in place on a watched module."""

    watchers: list[Watcher]
    undo: list[Callable[[], None]]


_watched: dict[int, _Watched] = {}  # by the module's id


def _call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    entry = _watched.get(id(module))
    for watcher in () if entry is None else tuple(entry.watchers):
        output = watcher(args, kwargs, output)
    return output


def _call_if_eager(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return output if torch.compiler.is_compiling() else _call(module, args, kwargs, output)


def outside_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which torch.compile runs as it is. Imports Dynamo: to be called where that is imported already."""
    reason = "selbp chooses rows in Python, between two graphs: compile without fullgraph=True"
    try:
        untraced: Callable[..., Any] = torch.compiler.disable(function, reason=reason)
    except TypeError:  # torch 2.6 asks for no reason
        untraced = torch.compiler.disable(function)
    return untraced


@functools.cache
def _untraced() -> Callable[..., Any]:
    return outside_graphs(_call)


@contextmanager
def watched(module: nn.Module, watcher: Watcher, *, optional: bool = False) -> Iterator[None]:
    """Inside, ``watcher(args, kwargs, output)`` gives the result of every forward of ``module``.

    Under ``torch.compile`` the watcher runs as ordinary Python, between two compiled parts. Where it is ``optional``,
    it does not run there, and the compiled code stays whole.
    """
    entry = _watched.get(id(module))
    if entry is None:
        entry = _watched[id(module)] = _Watched([], [])
        compiling = "torch._dynamo" in sys.modules and not optional
        # One function for all modules and steps: another one in each step would be compiled anew in each.
        call = _call_if_eager if optional else _untraced() if compiling else _call
        handle = module.register_forward_hook(call, with_kwargs=True)
        entry.undo.append(handle.remove)
        if compiling and not isinstance(module, torch.jit.ScriptModule):
            entry.undo.append(mark(module))
    entry.watchers.append(watcher)
    try:
        yield
    finally:
        entry.watchers.remove(watcher)
        if not entry.watchers:
            del _watched[id(module)]
            for undo in entry.undo:
                undo()


def mark(module: nn.Module) -> Callable[[], None]:
    """Give ``module`` a ``forward`` of its own that does what its forward does; returns what takes it away."""
    own = vars(module)
    patched = own.get("forward")
    if patched is None:
        own["forward"] = types.MethodType(type(module).forward, module)
        return functools.partial(own.pop, "forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        return patched(*args, **kwargs)

    own["forward"] = forward  # guarded by its code
    return functools.partial(own.__setitem__, "forward", patched)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` has been asked for any part of ``model``."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules())


def eagerly(model: nn.Module) -> AbstractContextManager[Any]:
    """Inside, compiled parts of ``model`` run as they were written: to compile them for one look may take minutes."""
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
