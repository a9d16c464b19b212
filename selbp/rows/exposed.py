"""Methods that read a tensor's memory without the dispatcher: pointers, storages, numpy, pickles.

A row gradient has no memory of the full shape, so these methods would read a null pointer. If the caller may write to
the memory, or keep it, the tensor takes on its n rows for good and hands out their memory. If the caller only reads, it
gets a copy. C++ code that asks for an untyped pointer gets torch's own error (see ``wrap``).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from selbp.rows.unsupported import FENCE


class Exposed:
    """The Python methods that torch does not dispatch. The subclass defines ``to_dense`` and ``_become_dense``."""

    __slots__ = ()
    _is_dense = False  # whether ``_data`` are the n rows

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return an ordinary tensor of n rows."""
        raise NotImplementedError

    def _become_dense(self) -> None:
        """Hold the n rows from now on."""
        raise NotImplementedError

    def _all_rows(self: Any, what: str, *, check_strides: bool = False) -> Tensor:
        """Become dense and return the n rows; counted under ``what``.

        With ``check_strides``, raise RuntimeError if the n rows have other strides than the tensor shows.
        """
        if not self._is_dense:
            self._rows.dense[f"Tensor.{what}"] += 1
            self._become_dense()
        data: Tensor = self._data
        if check_strides:
            dims = zip(data.shape, data.stride(), self.stride(), strict=True)
            if any(length != 1 and stored != shown for length, stored, shown in dims):
                raise RuntimeError(f"selbp: {what} of a row gradient whose memory has gaps; {FENCE}")
        return data

    def data_ptr(self: Any) -> int:
        """Return the address of the n rows, which live as long as this tensor."""
        return self._all_rows("data_ptr", check_strides=True).data_ptr()

    def storage_offset(self: Any) -> int:
        """Return where the n rows begin in their storage."""
        return int(self._data.storage_offset()) if self._is_dense else 0

    def untyped_storage(self: Any) -> Any:
        """Return the storage of the n rows."""
        return self._all_rows("untyped_storage", check_strides=True).untyped_storage()

    def _typed_storage(self: Any) -> Any:
        return self._all_rows("storage", check_strides=True)._typed_storage()

    def storage(self: Any) -> Any:
        """Return the typed storage of the n rows."""
        return self._all_rows("storage", check_strides=True).storage()

    def numpy(self: Any, *, force: bool = False) -> Any:
        """Return the n rows as an array that shares their memory."""
        return self._all_rows("numpy").numpy(force=force)

    def __array__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._all_rows("numpy").__array__(*args, **kwargs)

    def __dlpack__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._all_rows("__dlpack__", check_strides=True).__dlpack__(*args, **kwargs)

    @property
    def __cuda_array_interface__(self: Any) -> Any:
        if self.device.type != "cuda":
            raise AttributeError("only CUDA tensors have __cuda_array_interface__")
        return self._all_rows("__cuda_array_interface__").__cuda_array_interface__

    def tolist(self: Any) -> Any:
        """Return the n rows as a list."""
        return self.to_dense().tolist()

    def share_memory_(self: Any) -> Any:
        """Move the n rows to shared memory."""
        self._all_rows("share_memory_").share_memory_()
        return self

    def is_shared(self: Any) -> bool:
        """Return whether the n rows are in shared memory."""
        return self._is_dense and bool(self._data.is_shared())

    def apply_(self: Any, function: Any) -> Any:
        """Apply ``function`` to each entry of the n rows."""
        self._all_rows("apply_").apply_(function)
        return self

    def map_(self: Any, other: Any, function: Any) -> Any:
        """Apply ``function`` to each entry of the n rows and of ``other``."""
        self._all_rows("map_").map_(densify(other), function)
        return self

    def map2_(self: Any, first: Any, second: Any, function: Any) -> Any:
        """Apply ``function`` to each entry of the n rows, of ``first`` and of ``second``."""
        self._all_rows("map2_").map2_(densify(first), densify(second), function)
        return self

    @property
    def data(self: Any) -> Any:
        """The same memory, as ``detach()`` returns it."""
        return self.detach()

    @data.setter
    def data(self: Any, value: Tensor) -> None:
        """Give this tensor other memory, which its views do not share."""
        same = value.shape == self.shape and value.dtype == self.dtype
        if not same or value.device != self.device:
            raise RuntimeError(f"selbp: a row gradient's data must keep shape, dtype and device; {FENCE}")
        self._rows.dense["Tensor.data"] += 1
        self._become_dense()  # the views keep the memory that was
        _rebind(self, densify(value))

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Tensor:
        memo[id(self)] = out = copy.deepcopy(self.to_dense(), memo)
        return out

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return self.to_dense().__reduce_ex__(protocol)


def _rebind(item: Any, data: Tensor) -> None:
    item._before = getattr(item, "_before", item._data)
    item._data, item._parent = data, None


def densify(value: Any) -> Any:
    """Return ``value`` with every row-sparse tensor in it scattered back to n rows."""
    if isinstance(value, (list, tuple)):
        return [densify(item) for item in value]
    return value.to_dense() if isinstance(value, Exposed) else value
