"""The memory of a step: bytes of the tensors that are alive, and the resident set of a process.

The first is exact and the same on every machine, but does not see what a kernel allocates and frees within itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.costs import _status_bytes
from selbp.rows.gradient import Wrapper


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators made while it was on; ``peak`` is the most that were alive at once.

    It follows a row gradient's operators into their rules, where the k-row copies are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and look at what is alive then."""
        for value in pytree.tree_leaves((args, kwargs)):
            self._note(value, made=False)
        wrapper = next((kind for kind in types if issubclass(kind, Wrapper)), None)
        if wrapper is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = wrapper.__torch_dispatch__(func, types, args, kwargs)
        for value in pytree.tree_leaves(out):
            self._note(value, made=True)
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out

    def _note(self, value: Any, made: bool) -> None:
        if isinstance(value, Tensor) and not isinstance(value, Wrapper):
            storage = value.untyped_storage()
            if storage._cdata not in self._alive:  # a storage that an operator was given is not one that it made
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() if made else 0


def live_peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at once during ``call``, beyond those that were before."""
    with LiveBytes() as seen:
        call()
    return seen.peak


def resident_peak(call: Callable[[], object], times: int = 3) -> int:
    """Bytes by which the resident set of this process rises at most; a fresh process tells most."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    for _ in range(times):
        call()
    return _status_bytes("VmHWM") - before
