"""The gradient of n samples of which only k are not zero, as autograd's engine meets it.

``RowGradient`` is a wrapper: its *outer* shape is the full one, so that the engine's checks pass, and it stores the
k rows only. Every operator that a backward node runs on it reaches ``__torch_dispatch__``; a rule runs it on k rows, or
the gradient is scattered back to n rows ("densified", counted by operator name): the exact gradient either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selbp.rows.exposed import Exposed
from selbp.rows.layout import Layout, RowSet
from selbp.rows.registry import RULE_OF, NoRuleError

_make_wrapper = torch.Tensor._make_wrapper_subclass
# Code in C++ that asks for a pointer gets an error, not a null one.
_guard_pointer = getattr(torch._C, "_set_throw_on_mutable_data_ptr", lambda tensor: None)
_disabled_torch_function = torch._C._disabled_torch_function_impl

# The selections whose rows are being recomputed, innermost last: operators meet k rows in plain tensors.
recomputing: list[RowSet] = []

FAILED = "its rule failed"  # a reason

# Called with (func, args, result, reason or None) after every operator, while `diagnose` or a test listens.
observers: list[Callable[[Any, Any, Any, str | None], None]] = []


class Wrapper(Exposed, torch.Tensor):
    """What the three kinds of row-sparse tensors share.

    A GEMM leaves nothing of Python in the processor's caches, so what counts here is how much memory a dispatch
    touches: slots instead of a dict, one frame from torch to the rule, look-ups by id.
    """

    __slots__ = ("_data", "_layout", "_rows", "_parent", "_view", "_viewed", "_before")
    __torch_function__ = _disabled_torch_function  # type: ignore[assignment]

    _data: Tensor  # (…, pre * k * post, …) the k rows; for Dense all n rows
    _layout: Layout
    _rows: RowSet
    _parent: RowGradient | None  # the tensor that this one is a view of
    _view: tuple[Any, tuple[Any, ...], int | None]  # by which operator, and which of its results; where _parent is set
    _viewed: bool  # it has views
    _before: Tensor  # of a Dense whose ``data`` was exchanged: what its views still share

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """An ordinary tensor of the full shape, zero in the rows that were not chosen."""
        raise NotImplementedError

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{type(self).__name__}(shape={tuple(self.shape)}, k={self._rows.k})"

    def __coerce_same_metadata_as_tangent__(self, metadata: Any, expected_type: Any = None) -> Tensor | None:
        """A compiled region was traced with plain tangents: give it one."""
        return self.to_dense() if expected_type is torch.Tensor else None

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]
        func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from selbp.rows import fallback

        return fallback.run_mixed(func, types, args, kwargs or {})


def run_rule(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """Run ``func`` on k rows where a rule says how, else on n."""
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
            reason = f"{FAILED}: {error}"  # what is wrong with the call itself, n rows will say as well
        else:
            if observers:
                for observer in observers:
                    observer(func, args, out, None)
            return out
    from selbp.rows import fallback

    return fallback.run_dense(func, args, kwargs or {}, reason)


class RowGradient(Wrapper):
    """k rows that stand for n, see the module's text. Made by :func:`wrap`."""

    __slots__ = ()

    @staticmethod
    def __torch_dispatch__(  # type: ignore[override]
        func: Any, types: tuple[type, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if len(types) == 1:  # nothing but row gradients; rules apply to those of one selection
            for value in args:
                if type(value) is RowGradient:
                    if value._rows.stale:
                        break
                    return run_rule(func, args, kwargs)
        return Wrapper.__torch_dispatch__(func, types, args, kwargs)

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Scatter the k rows to n; a row chosen twice gets the sum."""
        if self._rows.stale:
            from selbp.rows import fallback

            fallback.catch_up((self,), {})
            if not isinstance(self, RowGradient):  # a view whose parent has become dense
                return self._data
        layout, rows, data = self._layout, self._rows, self._data
        full = torch.empty_strided(
            tuple(self.shape), _dense_strides(self.shape, self.stride()), dtype=data.dtype, device=data.device
        ).zero_()
        dim, pre, post = layout.dim, layout.pre, layout.post
        if pre == post == 1:
            return full.index_add_(dim, rows.on(data.device), data)
        full.unflatten(dim, (pre, rows.n, post)).index_add_(
            dim + 1, rows.on(data.device), data.unflatten(dim, (pre, rows.k, post))
        )
        return full


class Dense(Wrapper):
    """A RowGradient after an in-place write or a view that no rule covers: all n rows, shared with its views."""

    __slots__ = ()

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The n rows."""
        return self._data


class Zeros(Wrapper):
    """``gradient.new_zeros(size)``: zeros whose layout is that of what is written into them (see ``scatter``)."""

    __slots__ = ()

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The zeros themselves, or what was written to what they are a view of."""
        if self._parent is not None and not isinstance(self._parent, Zeros):
            from selbp.rows import fallback

            fallback.become_dense(self)
            return self._data
        return torch.zeros(tuple(self.shape), dtype=self.dtype, device=self.device)

    def laid_out(self, layout: Layout) -> Tensor:
        """The rows of these zeros that ``layout`` keeps."""
        size = list(self.shape)
        if layout.dim >= len(size) or size[layout.dim] != layout.full:
            raise NoRuleError("the zeros do not have the gradient's samples in that dim")
        size[layout.dim] = layout.kept
        strides = _dense_strides(size, self.stride())
        return torch.empty_strided(size, strides, dtype=self.dtype, device=self.device).zero_()


def wrap(data: Tensor, layout: Layout, outer: Any = None) -> RowGradient:
    """``data``, whose dim ``layout.dim`` holds (pre, k, post), as the gradient of all n samples.

    ``outer`` is the size and strides of the gradient of all n samples, where they are known.
    """
    if outer is None:
        key = (data.shape, data.stride())
        outer = layout.outer.get(key)
        if outer is None:
            outer = layout.outer[key] = _outer(data, layout)
    out: RowGradient = _make_wrapper(RowGradient, outer[0], outer[1], dtype=data.dtype, device=data.device)
    _guard_pointer(out)
    out._data, out._layout, out._rows, out._parent, out._viewed = data, layout, layout.rows, None, False
    return out


def _outer(data: Tensor, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and strides of the tensor of n samples that ``data`` stands for."""
    size, stride, dim = list(data.shape), data.stride(), layout.dim
    contiguous = data.is_contiguous()
    if size[dim] != layout.kept:
        raise AssertionError(f"a rule returned {tuple(size)} for {layout}")
    size[dim] = layout.full
    if contiguous:
        return tuple(size), tuple(_dense_strides(size, range(len(size), 0, -1)))
    if layout.kept == 1:  # the stride of a single row says nothing
        return tuple(size), tuple(_dense_strides(size, stride))
    if max(stride) != stride[dim] and stride[dim]:  # dims outside the samples' lie further apart in the full tensor
        n, k, own = layout.rows.n, layout.rows.k, stride[dim]
        stride = tuple(-(-apart // k) * n if apart > own else apart for apart in stride)
    return tuple(size), stride


def wrap_view(
    data: Tensor, layout: Layout, parent: RowGradient, func: Any, args: tuple[Any, ...], which: int | None = None
) -> RowGradient:
    """``wrap`` for the result of ``func(parent, *args)`` that shares the parent's memory."""
    out = wrap(data, layout, None if layout.rows.k > 1 else _outer_of_view(parent, func, args, which))
    out._parent, out._view, parent._viewed = parent, (func, args, which), True
    return out


def base_of(gradient: RowGradient) -> RowGradient:
    """What ``gradient`` is a view of, in the end; itself where it is none."""
    while gradient._parent is not None:
        gradient = gradient._parent
    return gradient


def writable(gradient: RowGradient) -> bool:
    """Whether a write to ``gradient``'s rows reaches all that share its memory on n rows."""
    copied = gradient._rows.copied
    return not copied or id(base_of(gradient)) not in copied


def _outer_of_view(
    parent: RowGradient, func: Any, args: tuple[Any, ...], which: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As :func:`_outer`, from the parent's: one row has any stride, so that the rows' own do not tell."""
    whole = torch.empty_strided(parent.shape, parent.stride(), dtype=parent.dtype, device="meta")
    view = func(whole, *args)
    view = view if which is None else view[which]
    return tuple(view.shape), view.stride()


def wrap_zeros(like: Wrapper, size: list[int], dtype: torch.dtype, device: torch.device, stride: Any = None) -> Zeros:
    """``new_zeros`` of a row gradient."""
    out: Zeros = _make_wrapper(Zeros, size, stride, dtype=dtype, device=device)
    _guard_pointer(out)
    out._rows, out._parent, out._viewed = like._rows, None, False
    return out


def _dense_strides(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Strides without gaps, in the order of dims that ``stride`` has."""
    out, apart = [0] * len(size), 1
    for axis in sorted(range(len(size)), key=lambda axis: (stride[axis], -axis)):
        out[axis] = apart
        apart *= max(size[axis], 1)
    return out


def densify(value: Any) -> Any:
    """``value`` with every row-sparse tensor in it scattered back."""
    if isinstance(value, (list, tuple)):
        return [densify(item) for item in value]
    return value.to_dense() if isinstance(value, Wrapper) else value
