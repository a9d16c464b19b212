"""The gradient of n samples of which only k are not zero, as autograd's engine meets it.

A ``RowGradient`` shows the full *outer* shape, so that the engine's checks pass, and stores only the k rows. Every
operator that a backward node runs on it reaches ``__torch_dispatch__``. If the operator has a rule, the rule runs it on
k rows. If not, the gradient is scattered back to n rows ("densified") and counted by the operator's name. The gradient
is exact either way.

An in-place write or a view without a rule needs the n rows to stay. The tensor then turns into ``Dense``, and its views
follow when they are next used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from selbp.rows.exposed import Exposed, densify
from selbp.rows.layout import Layout, RowSet
from selbp.rows.registry import RULE_OF, ZERO_RULES, NoRuleError
from selbp.rows.unsupported import refuse_reshaping, refuse_subclass

_disabled_torch_function = torch._C._disabled_torch_function_impl
_Excluding, _Keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey

FAILED = "its rule failed"  # how the reason begins if a rule raised an error


class Wrapper(Exposed, torch.Tensor):
    """Base of the three kinds of row-sparse tensors.

    A GEMM leaves nothing of Python in the processor's caches, so a dispatch costs as much as the memory that it
    touches. Hence slots instead of a dict, one frame from torch to the rule, and look-ups by id.
    """

    __slots__ = ("_data", "_layout", "_rows", "_parent", "_view", "_viewed", "_before")
    __torch_function__ = _disabled_torch_function  # type: ignore[assignment]

    _data: Tensor  # (…, pre * k * post, …) the k rows; for Dense all n rows
    _layout: Layout
    _rows: RowSet
    _parent: Wrapper | None  # the tensor that this one is a view of
    _view: tuple[Any, tuple[Any, ...], int | None]  # of a view: operator, arguments, which of its results
    _viewed: bool  # whether it has views
    _before: Tensor  # of a Dense whose ``data`` was exchanged: the memory that its views still share

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return an ordinary tensor of the full shape, zero in the rows that were not chosen."""
        raise NotImplementedError

    def _become_dense(self) -> None:
        """Hold the n rows from now on. A view becomes a view of its parent's n rows."""
        if self._is_dense:
            return
        parent = self._parent
        self._rows.stale |= self._viewed
        if parent is None:
            self._data = self.to_dense()
        else:
            parent._become_dense()
            func, args, which = self._view
            view = _call_resolved(func, (getattr(parent, "_before", parent._data), *args), {})
            self._data = view if which is None else view[which]
        self.__class__ = Dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, k={self._rows.k})"

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected_type: Any = None) -> Tensor | None:
        """Return an ordinary tensor for a compiled region, which was traced with one."""
        return self.to_dense() if expected_type is torch.Tensor else None

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]
        func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_mixed(func, types, args, kwargs or {})


class RowGradient(Wrapper):
    """A gradient of n samples that stores only the k rows that are not zero.

    Code meets one in hooks, in custom autograd functions, and as the result of ``torch.autograd.grad`` with respect to
    a hidden tensor. It behaves as the tensor of n rows: any operator, ``numpy()`` and a pickle give what n rows give.

    Attributes
    ----------
    shape, dtype, device
        Of the full gradient: (n, ...), the dtype and device of the tensor whose gradient it is.

    Notes
    -----
    Operators that change its own shape in place (``resize_``, ``t_``) raise NotImplementedError. C++ code that asks for
    a pointer outside an operator gets torch's own error.

    See Also
    --------
    selbp.select : makes the backward run on k rows.
    selbp.fence : gives a tensor an ordinary gradient.

    Examples
    --------
    >>> import torch, selbp
    >>> x = torch.ones(4, 2, requires_grad=True)
    >>> hidden = 2 * x
    >>> (gradient,) = torch.autograd.grad(selbp.select(hidden, torch.tensor([2])).sum(), hidden)
    >>> gradient
    RowGradient(shape=(4, 2), k=1)
    >>> gradient.to_dense()
    tensor([[0., 0.],
            [0., 0.],
            [1., 1.],
            [0., 0.]])
    """

    __slots__ = ()

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]
        func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(types) == 1:  # row gradients alone; rules check that they are of one selection
            for value in args:
                if type(value) is RowGradient:
                    rows = value._rows
                    if rows.stale:
                        break
                    return run_rule(func, args, kwargs, rows)
        return run_mixed(func, types, args, kwargs or {})

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scatter the k rows to n rows. A row that was chosen twice gets the sum."""
        if self._rows.stale:
            _catch_up((self,), {})
            if self._is_dense:  # a view whose parent has become dense
                return self._data
        layout, rows, data = self._layout, self._rows, self._data
        full = torch.empty_strided(
            tuple(self.shape), dense_strides(self.shape, self.stride()), dtype=data.dtype, device=data.device
        ).zero_()
        dim, pre, post = layout.dim, layout.pre, layout.post
        if pre == post == 1:
            return full.index_add_(dim, rows.on(data.device), data)
        full.unflatten(dim, (pre, rows.n, post)).index_add_(
            dim + 1, rows.on(data.device), data.unflatten(dim, (pre, rows.k, post))
        )
        return full


class Dense(Wrapper):
    """A RowGradient after an in-place write or a view without a rule: it holds all n rows, shared with its views."""

    __slots__ = ()
    _is_dense = True

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the n rows."""
        return self._data


class Zeros(Wrapper):
    """The result of ``gradient.new_zeros(size)``. The first write into it decides where its samples are."""

    __slots__ = ()

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros, or for a view the part of its parent that was written to."""
        if self._parent is not None and not isinstance(self._parent, Zeros):
            self._become_dense()
            return self._data
        return torch.zeros(tuple(self.shape), dtype=self.dtype, device=self.device)

    def rows_of(self, layout: Layout) -> Tensor:
        """Return zeros for the rows that ``layout`` keeps."""
        size = list(self.shape)
        if layout.dim >= len(size) or size[layout.dim] != layout.full:
            raise NoRuleError("the zeros do not have the gradient's samples in that dim")
        size[layout.dim] = layout.kept
        strides = dense_strides(size, self.stride())
        return torch.empty_strided(size, strides, dtype=self.dtype, device=self.device).zero_()


def dense_strides(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Return strides without gaps for ``size``, with the dims in the order that ``stride`` gives them in memory."""
    out, step = [0] * len(size), 1
    for axis in sorted(range(len(size)), key=lambda axis: (stride[axis], -axis)):
        out[axis] = step
        step *= max(size[axis], 1)
    return out


def run_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, rows: RowSet) -> Any:
    """Run ``func`` on k rows if it has a rule that applies, else on n rows.

    An error in the rule itself also ends there: a wrong rule whose shapes do not fit k rows is slower, not wrong. With
    k = n every shape fits, so that is where a wrong rule would show; the tests have such selections of each operator.
    """
    rule = RULE_OF.get(id(func))
    if rule is None:
        reason = "no rule"
    else:
        try:
            out = rule(func, *args, **kwargs) if kwargs else rule(func, *args)
        except NoRuleError as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError) as error:
            reason = f"{FAILED}: {error}"  # if the call itself is wrong, it raises on n rows too
        else:
            if rows.observers:
                for observer in rows.observers:
                    observer.ran(func, args, out, None)
            return out
    return run_dense(func, args, kwargs or {}, reason)


def run_dense(func: Any, args: Any, kwargs: dict[str, Any], reason: str) -> Any:
    """Run ``func`` on n rows."""
    if func._schema.is_mutable:
        refuse_reshaping(func)
    source = next((value for value in _tensors(args, kwargs) if isinstance(value, RowGradient)), None)
    if source is not None:  # without a row gradient no row is lost, and nothing is counted
        source._rows.dense[str(func)] += 1
    _densify_aliased(func, args, kwargs)
    out = _call_resolved(func, densify(args), {name: densify(value) for name, value in kwargs.items()})
    if func._schema.is_mutable and args and isinstance(args[0], Dense):
        out = args[0]
    if source is not None:
        for observer in source._rows.observers:
            observer.ran(func, args, out, reason)
    return out


def run_mixed(func: Any, types: tuple[type, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on arguments of several kinds: refuse the unsupported kinds, reduce the others to one kind."""
    for kind in types:
        if not issubclass(kind, Wrapper):  # another tensor subclass: it knows n rows only
            refuse_subclass(func, kind)
            return run_dense(func, args, kwargs, f"an operand is a {kind.__name__}")
    _catch_up(args, kwargs)
    wrappers = [value for value in _tensors(args, kwargs) if isinstance(value, Wrapper)]
    kinds = {type(value) for value in wrappers}
    if kinds == {RowGradient}:
        return run_rule(func, args, kwargs, wrappers[0]._rows)
    if Zeros in kinds:
        rule = ZERO_RULES.get(func)
        if rule is not None:
            try:
                return rule(func, *args, **kwargs)
            except NoRuleError:
                pass
        if RowGradient in kinds and not func._schema.is_mutable:
            return _dispatch_without(Zeros, func, args, kwargs)
    if RowGradient in kinds and not isinstance(args[0], (Dense, Zeros)):
        return _dispatch_without(Dense, func, args, kwargs)
    return run_dense(func, args, kwargs, "an operand had become dense")


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments of an operator call, and the items of lists among them."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _dispatch_without(kind: type[Wrapper], func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Dispatch once more, with the operands of ``kind`` scattered back to n rows."""

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return value.to_dense() if isinstance(value, kind) else value

    plain_kwargs = {name: plain(value) for name, value in kwargs.items()}
    return _call_resolved(func, [plain(value) for value in args], plain_kwargs)


def _call_resolved(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call ``func`` on tensors that may have a conjugate or negative bit, which torch ignores inside a dispatch."""
    with _Excluding(_Keys.Conjugate, False), _Excluding(_Keys.Negative, False):
        if func is torch.ops.aten.view_as_real.default and args[0].is_conj():
            # The wrapper has no conjugate bit, so torch asked for another operator than it would have on n rows.
            raise NotImplementedError(
                "selbp: the real or imaginary part of a gradient's conjugate is written to in place, or aliased, below "
                "a row selection: write out of place, or put selbp.fence() around the tensor"
            )
        return func(*args, **kwargs)


def _densify_aliased(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Make dense each argument that ``func`` writes to, or that its result aliases."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, (RowGradient, Zeros)):
                item._become_dense()


def _catch_up(args: Any, kwargs: dict[str, Any]) -> None:
    """Make dense the views whose parent has become dense."""
    for item in _tensors(args, kwargs):
        if type(item) is RowGradient and item._rows.stale:
            ancestor: Any = item._parent
            while isinstance(ancestor, RowGradient):
                ancestor = ancestor._parent
            if ancestor is not None:
                item._become_dense()
