"""What happens to an operator without a rule: the gradient is scattered back to n rows and counted by name.

Also in-place writes and views that no rule covers. They need the n rows to stay, so the tensor turns into ``Dense``;
its views follow when they are next used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from selbp.training.backward.rows.exposed import refuse_reshaping
from selbp.training.backward.rows.registry import NoRuleError
from selbp.training.backward.rows.tensor import Dense, RowGradient, Wrapper, Zeros, densify, observers, run_rule

_Excluding, _Keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey

# Operators on ``gradient.new_zeros(...)``, see ``scatter``.
ZERO_RULES: dict[Any, Callable[..., Any]] = {}


def tensors(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments of an operator call, lists of tensors opened."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def run_dense(func: Any, args: Any, kwargs: dict[str, Any], reason: str) -> Any:
    """Run ``func`` on n rows."""
    if func._schema.is_mutable:
        refuse_reshaping(func)
    source = next((value for value in tensors(args, kwargs) if isinstance(value, RowGradient)), None)
    if source is not None:  # else nothing row-sparse is lost, and nothing is counted
        source._rows.dense[str(func)] += 1
    _share(func, args, kwargs)
    out = _resolving(func, densify(args), {name: densify(value) for name, value in kwargs.items()})
    if func._schema.is_mutable and args and isinstance(args[0], Dense):
        out = args[0]
    if source is not None:
        for observer in observers:
            observer(func, args, out, reason)
    return out


def run_mixed(func: Any, types: tuple[type, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """Arguments of several kinds: refuse what is untested, then reduce to the plain case."""
    for kind in types:
        if kind.__name__ == "DTensor":
            raise NotImplementedError(
                f"selbp: {func} met a DTensor in the backward of a row selection, where activations must be plain "
                'tensors; use backward="recompute".'
            )
        if not issubclass(kind, Wrapper):  # a tensor subclass of somebody else's: n rows are what it knows
            return run_dense(func, args, kwargs, f"an operand is a {kind.__name__}")
    catch_up(args, kwargs)
    kinds = {type(value) for value in tensors(args, kwargs) if isinstance(value, Wrapper)}
    if kinds == {RowGradient}:
        return run_rule(func, args, kwargs)
    if Zeros in kinds:
        rule = ZERO_RULES.get(func)
        if rule is not None:
            try:
                return rule(func, *args, **kwargs)
            except NoRuleError:
                pass
        if RowGradient in kinds and not func._schema.is_mutable:
            return _again(func, args, kwargs, Zeros)
    if RowGradient in kinds and not isinstance(args[0], (Dense, Zeros)):
        return _again(func, args, kwargs, Dense)
    return run_dense(func, args, kwargs, "an operand had become dense")


def _again(func: Any, args: Any, kwargs: dict[str, Any], kind: type[Wrapper]) -> Any:
    """Dispatch once more with the operands of ``kind`` scattered back."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.to_dense() if isinstance(value, kind) else value

    return _resolving(func, [plain(value) for value in args], {name: plain(value) for name, value in kwargs.items()})


def _resolving(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call ``func`` on tensors that may have a conjugate or negative bit, which torch ignores inside a dispatch."""
    with _Excluding(_Keys.Conjugate, False), _Excluding(_Keys.Negative, False):
        if func is torch.ops.aten.view_as_real.default and args[0].is_conj():
            # Asked of a wrapper, which has no conjugate bit: what torch would have asked instead is not known.
            raise NotImplementedError(
                "selbp: the real or imaginary part of a gradient's conjugate is written to in place, or aliased, below "
                "a row selection: write out of place, or put selbp.fence() around the tensor"
            )
        return func(*args, **kwargs)


def _share(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """An argument that the operator writes to, or that its result aliases, must itself become the n rows."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, (RowGradient, Zeros)):
                become_dense(item)


def become_dense(item: Any) -> None:
    """Give ``item`` its n rows for good, as a view of its parent's n rows where it is a view."""
    if isinstance(item, Dense):
        return
    parent = item._parent
    item._rows.stale |= item._viewed
    if parent is None:
        item._data = item.to_dense()
    else:
        if not isinstance(parent, Dense):
            become_dense(parent)
        func, args, which = item._view
        view = _resolving(func, (getattr(parent, "_before", parent._data), *args), {})
        item._data = view if which is None else view[which]
    item.__class__ = Dense


def catch_up(args: Any, kwargs: dict[str, Any]) -> None:
    """Make dense the views whose parent has become so."""
    for item in tensors(args, kwargs):
        if type(item) is RowGradient and item._rows.stale:
            ancestor: Any = item._parent
            while isinstance(ancestor, RowGradient):
                ancestor = ancestor._parent
            if ancestor is not None:
                become_dense(item)
