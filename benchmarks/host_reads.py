"""How often a call reads a value back to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}
_COPIES = {"_to_copy", "copy_"}


def _off_the_device(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu"


class _Dispatched(TorchDispatchMode):
    """Counts operators that wait for a value, or for the length of a result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name in _READS
        if name in ("index", "index_put", "index_put_"):  # a mask becomes indices
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif name == "repeat_interleave":
            self.count += func._overloadname == "Tensor" and (kwargs or {}).get("output_size") is None
        result = func(*args, **(kwargs or {}))
        if name in _COPIES:
            source = args[1] if name == "copy_" else args[0]
            self.count += _off_the_device(result) and not _off_the_device(source)
        return result


class _Called(TorchFunctionMode):
    """Counts, of tensors on the CPU, the methods that would wait for a device: there they reach no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "__array__"):
            self.count += _off_the_device(args[0])
        return func(*args, **(kwargs or {}))


def host_reads(call: Callable[[], object]) -> tuple[int, object]:
    """How often ``call`` reads a value or a data-dependent length back, and what it returns.

    On a GPU each of them waits for all work before it. On the CPU tensors stand for those on a GPU: conversions that
    cost nothing there (``.cpu()``, ``.tolist()``) count all the same, and so does what code does for CPU tensors only.
    """
    with _Called() as called, _Dispatched() as dispatched:
        result = call()
    return called.count + dispatched.count, result
