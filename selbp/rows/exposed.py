"""What reaches a tensor's memory past the dispatcher: pointers, storages, numpy, pickles.

A wrapper has no memory of the full shape, so these would read a null pointer. Where the caller may write, or keep what
it got, the wrapper takes on its n rows for good (``fallback.become_dense``) and hands out theirs; where it only reads,
a copy does. Code in C++ that asks for an untyped pointer meets torch's own error (see ``tensor.wrap``).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

FENCE = "put selbp.fence(x) around the tensor x whose gradient this is: it gets an ordinary one"


class Exposed:
    """The Python methods of a wrapper that torch does not dispatch."""

    __slots__ = ()

    def _settled(self: Any, what: str, *, as_shown: bool = False) -> Tensor:
        """The n rows, which stay; ``as_shown`` with the strides that the wrapper shows. Counted under ``what``."""
        from selbp.rows import fallback
        from selbp.rows.gradient import Dense

        if not isinstance(self, Dense):
            self._rows.dense[f"Tensor.{what}"] += 1
            fallback.become_dense(self)
        data: Tensor = self._data
        if as_shown:
            shown = zip(data.shape, data.stride(), self.stride(), strict=True)
            if any(length != 1 and own != outer for length, own, outer in shown):
                raise RuntimeError(f"selbp: {what} of a row gradient whose memory has gaps; {FENCE}")
        return data

    def data_ptr(self: Any) -> int:
        """Of the n rows, which live as long as this tensor."""
        return self._settled("data_ptr", as_shown=True).data_ptr()

    def storage_offset(self: Any) -> int:
        """Where the n rows begin in their storage."""
        from selbp.rows.gradient import Dense

        return int(self._data.storage_offset()) if isinstance(self, Dense) else 0

    def untyped_storage(self: Any) -> Any:
        """Of the n rows."""
        return self._settled("untyped_storage", as_shown=True).untyped_storage()

    def _typed_storage(self: Any) -> Any:
        return self._settled("storage", as_shown=True)._typed_storage()

    def storage(self: Any) -> Any:
        """Of the n rows."""
        return self._settled("storage", as_shown=True).storage()

    def numpy(self: Any, *, force: bool = False) -> Any:
        """The n rows, shared."""
        return self._settled("numpy").numpy(force=force)

    def __array__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._settled("numpy").__array__(*args, **kwargs)

    def __dlpack__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._settled("__dlpack__", as_shown=True).__dlpack__(*args, **kwargs)

    @property
    def __cuda_array_interface__(self: Any) -> Any:
        if self.device.type != "cuda":
            raise AttributeError("__cuda_array_interface__ is of CUDA tensors")
        return self._settled("__cuda_array_interface__").__cuda_array_interface__

    def tolist(self: Any) -> Any:
        """Of the n rows."""
        return self.to_dense().tolist()

    def share_memory_(self: Any) -> Any:
        """Of the n rows."""
        self._settled("share_memory_").share_memory_()
        return self

    def is_shared(self: Any) -> bool:
        """Whether the n rows are."""
        from selbp.rows.gradient import Dense

        return isinstance(self, Dense) and bool(self._data.is_shared())

    def apply_(self: Any, function: Any) -> Any:
        """Of the n rows."""
        self._settled("apply_").apply_(function)
        return self

    def map_(self: Any, other: Any, function: Any) -> Any:
        """Of the n rows."""
        self._settled("map_").map_(_plain(other), function)
        return self

    def map2_(self: Any, first: Any, second: Any, function: Any) -> Any:
        """Of the n rows."""
        self._settled("map2_").map2_(_plain(first), _plain(second), function)
        return self

    @property
    def data(self: Any) -> Any:
        """As ``detach()``: it shares the memory."""
        return self.detach()

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        """Other memory for this tensor, which its views do not share."""
        same = value.shape == self.shape and value.dtype == self.dtype
        if not same or value.device != self.device:
            raise RuntimeError(f"selbp: a row gradient's data must keep shape, dtype and device; {FENCE}")
        from selbp.rows import fallback

        self._rows.dense["Tensor.data"] += 1
        fallback.become_dense(self)  # for the views, which keep what was
        _rebind(self, _plain(value))

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = out = copy.deepcopy(self.to_dense(), memo)
        return out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)


def _plain(value: Any) -> Any:
    from selbp.rows.gradient import densify

    return densify(value)


def _rebind(item: Any, data: Tensor) -> None:
    item._before = getattr(item, "_before", item._data)
    item._data, item._parent = data, None


def refuse_reshaping(func: Any) -> None:
    """An operator that changes a tensor's own shape or storage in place: the wrapper's outer shape is not to change."""
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"selbp: {func} of a row gradient would change its shape or memory in place; {FENCE}")
