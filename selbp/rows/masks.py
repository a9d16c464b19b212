"""What a checkpointed block draws: its dropout masks, recorded in the first run and replayed in the second.

Any other draw is refused: the second run, on the chosen rows alone, could not repeat it. Generators are the process's,
and another thread may have drawn. So a run during which a generator moved is repeated, up to 16 runs in all, unless it
wrote to a buffer. The output is that of a run during which none moved.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from selbp._torch import version_of
from selbp.ops._backends import capturing
from selbp.rows.layout import RowSet

_DROPOUTS = {functional.dropout, torch.dropout}
_CHANNEL_DROPOUTS = {functional.dropout1d, functional.dropout2d, functional.dropout3d, torch.feature_dropout}

RUNS = 16  # of a block before it is taken to draw

OTHER_DRAW = (
    "selbp.checkpoint: the block draws random numbers that are not a dropout mask (attention or recurrent layers with "
    "dropout, AlphaDropout, noise), and its second run would draw others. Set that dropout to 0, or use "
    "torch.utils.checkpoint for this block"
)
SOMEBODY_DREW = (
    f"{OTHER_DRAW}. If the block draws nothing, another thread drew from a global generator (random, numpy.random, "
    f"torch) in each of {RUNS} runs of it, or in one that wrote to a buffer: give that thread a generator of its own"
)


def _mask_shape(func: Any, x: Tensor) -> list[int]:
    """Return the shape in which the mask of dropout ``func`` of ``x`` is kept: once for all places of a channel."""
    shape = list(x.shape)
    if func in _CHANNEL_DROPOUTS:
        shape[2:] = [1] * (len(shape) - 2)
    return shape


class _Dropouts(TorchFunctionMode):
    """Multiply by masks of our own where the code inside calls dropout, and see whether anything else is drawn.

    Code that draws moves a generator's state. That finds draws in C++ too, and those in functions that torch calls with
    this mode switched off (multi-head attention).
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.drew = False  # whether anybody drew anything else in the last run
        self._next = 0  # the next mask
        self._devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}

    def __enter__(self) -> Any:
        super().__enter__()
        self.drew, self._next = False, 0
        self._torch, self._others = self._states(), _states_outside_torch()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        if kind is None:
            self._look()
            self.drew |= self._others != _states_outside_torch()

    def _states(self) -> list[Tensor]:
        """Return the states of torch's generators for the CPU and the block's devices."""
        states = [torch.get_rng_state()]
        for device in self._devices:
            if capturing(device):
                continue  # the state cannot be read there; the runs before the capture have checked the block
            module = torch.get_device_module(device)
            states.append(module.get_rng_state() if device.type == "mps" else module.get_rng_state(device))
        return states

    def _look(self) -> None:
        """Note whether torch's generators have moved since the last mask."""
        self.drew |= not all(map(torch.equal, self._torch, self._states()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS or func in _CHANNEL_DROPOUTS:
            return self._drop(func, *args, **kwargs)
        if kwargs.get("generator") is not None:
            raise NotImplementedError(OTHER_DRAW)
        return func(*args, **kwargs)

    def _drop(
        self,
        func: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        train: bool | None = None,  # as torch.dropout names `training`
    ) -> Tensor:
        if not (training if train is None else train) or p == 0.0:
            return input
        mask = self._mask(func, input, p)
        scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
        return input.mul_(mask).mul_(scale) if inplace else input * mask * scale

    def _mask(self, func: Any, x: Tensor, p: float) -> Tensor:
        """Return the bool mask of this call."""
        raise NotImplementedError


class Recording(_Dropouts):
    """Record the masks of a first run on n rows, one byte per entry. A run that is made again gets them again."""

    def __init__(self, n: int, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self.masks: list[Tensor] = []
        self._n = n

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        del self.masks[self._next :]

    def _mask(self, func: Any, x: Tensor, p: float) -> Tensor:
        self._look()
        if self._next == len(self.masks) or list(self.masks[self._next].shape) != _mask_shape(func, x):
            self.masks[self._next :] = [self._drawn(func, x, p)]
            self._torch = self._states()
        self._next += 1
        return self.masks[self._next - 1]

    def _drawn(self, func: Any, x: Tensor, p: float) -> Tensor:
        # The draw of the network without a checkpoint. Where a block that holds this one is running again, its mode
        # answers, with the mask that it recorded.
        mask = func(torch.ones_like(x), p, True) != 0
        for dim, size in enumerate(_mask_shape(func, x)):
            mask = mask.narrow(dim, 0, size)
        if self._n not in mask.shape:
            raise NotImplementedError(
                f"selbp.checkpoint: dropout of a tensor {tuple(x.shape)} without a dim of the {self._n} samples"
            )
        return mask.contiguous()


class Replaying(_Dropouts):
    """Replay the masks of a first run, in a second one on ``rows`` of its n rows (None: on all of them)."""

    def __init__(self, masks: list[Tensor], rows: RowSet | None, tensors: Iterable[Tensor]) -> None:
        super().__init__(tensors)
        self._recorded, self._rows = masks, rows

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        if kind is None and self._next != len(self._recorded):
            raise _other_dropouts(f"{self._next} calls", f"{len(self._recorded)}")

    def _mask(self, func: Any, x: Tensor, p: float) -> Tensor:
        if self._next == len(self._recorded):
            raise _other_dropouts("more calls", f"{len(self._recorded)}")
        mask, shape = self._recorded[self._next], _mask_shape(func, x)
        self._next += 1
        if self._rows is not None:
            # The dim whose size went from n to k holds the samples. Where no size changed, all samples share the mask.
            dims = [dim for dim, (before, now) in enumerate(zip(mask.shape, shape, strict=False)) if before != now]
            if len(dims) == 1 and mask.shape[dims[0]] == self._rows.n:
                mask = mask.index_select(dims[0], self._rows.on(mask.device))
        if list(mask.shape) != shape:
            raise _other_dropouts(f"a mask {tuple(shape)}", f"{tuple(mask.shape)}")
        return mask


def undisturbed(masks: _Dropouts, buffers: list[Tensor], run: Callable[[], Any]) -> Any:
    """Return what ``run`` gives inside ``masks`` where nobody draws anything else.

    Raises NotImplementedError where somebody does in each of ``RUNS`` runs, or in one that writes to ``buffers``.
    """
    versions = [version_of(x) for x in buffers]
    for _ in range(RUNS):
        with masks:
            out = run()
        if not masks.drew:
            return out
        if versions != [version_of(x) for x in buffers]:
            break  # another run would write to them once more
    raise NotImplementedError(SOMEBODY_DREW)


def _other_dropouts(now: str, before: str) -> RuntimeError:
    return RuntimeError(
        f"selbp.checkpoint: the block's second run drew other dropout masks than its first, {now} instead of {before}: "
        "the block must treat samples independently, and keep its mode and its dropout until the backward"
    )


def _states_outside_torch() -> tuple[Any, bytes]:
    """Return the states of Python's and NumPy's global generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), b"" if numpy is None else pickle.dumps(numpy.random.get_state())
