"""A pretended accelerator whose process group takes its own tensors only, as NCCL's does.

Its tensors hold ordinary ones, and say that they are on the device ``"meta"``. What CUDA refuses is refused: operators
on tensors of two devices, a view as an array, collectives of a CPU's tensors. The collectives run over the gloo group
that there is. A model on it runs the generic code of an accelerator, no kernel of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.rows.gradient import Wrapper

THERE = torch.device("meta")
ANY_DEVICE = ("_to_copy", "copy_", "index", "index_put_", "index_put")  # an index may be the host's


class Elsewhere(Tensor):
    """A tensor on the pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=THERE
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **unused: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held})"


class _Generator(torch.Generator):
    """Says that it is where it was asked to be."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made: _Generator = super().__new__(cls)
        made.place = torch.device(device)  # type: ignore[attr-defined]
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place  # type: ignore[attr-defined, no-any-return]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, Elsewhere)]
    here = [x for x in tensors if not isinstance(x, Elsewhere)]
    name = func._schema.name.partition("::")
    if name[0] == "c10d" and here:
        raise RuntimeError(f"{func}: no backend for the device cpu, on which a tensor {tuple(here[0].shape)} is")
    if there and any(x.dim() for x in here) and name[2] not in ANY_DEVICE:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    device = kwargs.get("device")
    goes = torch.device(device) == THERE if device is not None else bool(there)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    plain = [x.held if isinstance(x, Elsewhere) else x for x in pytree.tree_leaves((args, kwargs))]
    out = func(*(tree := pytree.tree_unflatten(plain, pytree.tree_structure((args, kwargs))))[0], **tree[1])
    mutable = [x for x in there if any(x.held is y for y in pytree.tree_leaves(out))]
    if len(mutable) == 1 and func._schema.is_mutable and isinstance(out, Tensor):
        return mutable[0]
    wrap = functools.partial(pytree.tree_map_only, Tensor, Elsewhere)
    return wrap(out) if goes else out


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if issubclass(kind, Wrapper):
                with self:
                    return kind.__torch_dispatch__(func, types, args, kwargs)
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What reads or makes values without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == THERE:
            return Elsewhere(func(*args, **{**kwargs, "device": "cpu"}))
        if func is Tensor.tolist and isinstance(args[0], Elsewhere):
            return args[0].held.tolist()
        if func is Tensor.numpy and isinstance(args[0], Elsewhere):
            raise TypeError("can't convert a tensor of a device to numpy: use Tensor.cpu()")
        return func(*args, **kwargs)


@contextmanager
def accelerator() -> Iterator[None]:
    """Inside, ``"meta"`` is the pretended device, and the process group its own."""
    off, half = (lambda kind: False), (lambda kind: torch.bfloat16)
    objects = "torch.distributed.distributed_c10d._get_object_coll_device"
    with mock.patch("torch.is_autocast_enabled", off), mock.patch("torch.get_autocast_dtype", half):
        with mock.patch(objects, lambda group=None: THERE.type), mock.patch("torch.Generator", _Generator):
            with mock.patch("torch.cuda.Event", mock.MagicMock), mock.patch("torch.cuda.current_stream"):
                with _Functions(), _Operators():
                    yield


def moved(value: Any) -> Any:
    """A module or tensors, on the pretended device."""
    if isinstance(value, nn.Module):
        for module in value.modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    module._parameters[name] = nn.Parameter(Elsewhere(p.detach()), p.requires_grad)
            for name, x in module._buffers.items():
                module._buffers[name] = None if x is None else Elsewhere(x)
        return value
    return pytree.tree_map_only(Tensor, Elsewhere, value)
