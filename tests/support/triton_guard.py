"""Makes Triton's CPU interpreter (3.7 to 3.9) trustworthy enough to test with. Test-only; one call installs it.

1. bfloat16 operands of ``tl.dot`` are multiplied as bfloat16 (the interpreter multiplies their bit patterns as
   integers), casts to bfloat16 round to nearest even, and ``tl.fma`` rounds once.
2. Arithmetic on bfloat16 tensors, silently wrong in the interpreter, is an error: kernels upcast first.
3. Every address that a load, store or atomic touches must lie inside a tensor argument of the running launch.
4. Bytes requested and flops of ``tl.dot`` are counted, for comparison with the formula that the roofline uses.
5. Atomics are an error: results must not depend on the order of the programs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter


class OutOfBounds(RuntimeError):
    """An address outside every tensor of the launch."""


@dataclass
class Traffic:
    """What the launches since the last ``reset`` requested."""

    load_bytes: int = 0
    store_bytes: int = 0
    dot_flops: int = 0

    def reset(self) -> None:
        self.load_bytes = self.store_bytes = self.dot_flops = 0


traffic = Traffic()
_extents: list[tuple[int, int]] = []
_Builder = interpreter.InterpreterBuilder
_original = {
    name: getattr(_Builder, name)
    for name in ("create_dot", "cast_impl", "binary_op", "create_masked_load", "create_masked_store")
}
_launch = interpreter.GridExecutor.__call__
_patch_lang_tensor = interpreter._patch_lang_tensor


def _widen(handle: interpreter.TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def _dot(self, a, b, accumulator, precision, imprecise):
    traffic.dot_flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
    if a.dtype.scalar != tl.bfloat16:
        return _original["create_dot"](self, a, b, accumulator, precision, imprecise)
    product = np.matmul(_widen(a), _widen(b), dtype=accumulator.data.dtype)
    return interpreter.TensorHandle(product + accumulator.data, accumulator.dtype.scalar)


def _cast(self, source, target):
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_to_bfloat16(source.data), tl.bfloat16)
    if source.dtype.scalar == tl.bfloat16 and target.scalar not in (tl.float32, tl.bfloat16):
        raise TypeError(f"cast of bfloat16 to {target}: go through float32")
    return _original["cast_impl"](self, source, target)


def _binary(self, left, right, operation):
    if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
        raise TypeError("arithmetic on bfloat16: upcast to float32 first")
    return _original["binary_op"](self, left, right, operation)


def _fma(self, x, y, z):
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    with np.errstate(over="ignore"):
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


def _check(pointers, mask, size: int, what: str) -> int:
    shape = np.broadcast_shapes(pointers.shape, mask.shape)
    touched = np.broadcast_to(pointers, shape)[np.broadcast_to(mask, shape)]
    if touched.size == 0:
        return 0
    inside = np.zeros(touched.shape, bool)
    for low, high in _extents:
        inside |= (touched >= low) & (touched + size <= high)
    if not inside.all():
        first = int(touched[~inside][0])
        low, high = min(_extents, key=lambda e: min(abs(first - e[0]), abs(first - e[1])))
        raise OutOfBounds(
            f"{what}: {int((~inside).sum())} of {touched.size} addresses are outside every argument, the first "
            f"{first - high:+d} bytes from the end of a tensor of {high - low} bytes"
        )
    return touched.size * size


def _load(self, pointers, mask, other, *args, **kwargs):
    size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
    traffic.load_bytes += _check(pointers.data, mask.data, size, "load")
    return _original["create_masked_load"](self, pointers, mask, other, *args, **kwargs)


def _store(self, pointers, value, mask, *args, **kwargs):
    size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
    traffic.store_bytes += _check(pointers.data, mask.data, size, "store")
    return _original["create_masked_store"](self, pointers, value, mask, *args, **kwargs)


def _atomic(self, *args, **kwargs):
    raise TypeError("atomic operation: the result would depend on the order of the programs")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "base"):
        yield from _tensors(value.base)


def _call(self, *args, **kwargs):
    before = len(_extents)
    for tensor in _tensors([*args, *kwargs.values()]):
        if tensor.numel():
            # The view's own extent, not its storage's: a neighbour's memory is out of bounds too.
            length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            _extents.append((tensor.data_ptr(), tensor.data_ptr() + length * tensor.element_size()))
    try:
        with np.errstate(all="ignore"):
            return _launch(self, *args, **kwargs)
    finally:
        del _extents[before:]


def _patch_tensor(tensor, *scope):
    """Triton before 3.7 turns an array of one element into an index, which numpy 2.4 refuses."""
    _patch_lang_tensor(tensor, *scope)
    index = lambda self: int(self.handle.data.item())  # noqa: E731
    scope[0].set_attr(tensor, "__index__", index) if scope else setattr(tensor, "__index__", index)


def install() -> None:
    """Replace the interpreter's primitives; the process must have imported Triton with TRITON_INTERPRET=1."""
    _Builder.create_dot, _Builder.cast_impl, _Builder.binary_op = _dot, _cast, _binary
    _Builder.create_fma = _fma
    _Builder.create_masked_load, _Builder.create_masked_store = _load, _store
    _Builder.create_atomic_rmw = _Builder.create_atomic_cas = _atomic
    interpreter.GridExecutor.__call__ = _call
    interpreter._patch_lang_tensor = _patch_tensor
