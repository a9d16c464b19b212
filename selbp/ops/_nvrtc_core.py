"""The kernels that NVRTC compiled, with the face of the built core ``selbp._native_cuda``.

Launched through the driver's interface by ctypes, on the caller's stream; nothing waits. ``match_grid``, which spreads
one large problem over the GPU, is in the built core alone: a problem whose arrays exceed a block's shared memory is
refused by :meth:`Core.fits`, and a large tableau lies in global memory.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from selbp.ops import _nvrtc

WARP, MOST_THREADS = 32, 512
_T = TypeVar("_T")
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PASSING = (2, *range(900, 909))  # error codes, the driver's and the runtime's: no memory left, and those of a capture


class PassingError(RuntimeError):
    """An error that may be gone at the next call."""


def kept(function: Callable[..., _T]) -> Callable[..., _T | str]:
    """``function``, called once for its arguments. What a :class:`PassingError` says is returned and not kept."""
    cached = functools.cache(function)

    @functools.wraps(function)
    def answer(*arguments: Any) -> _T | str:
        try:
            return cached(*arguments)
        except PassingError as error:
            return str(error)

    return answer


class Options(ctypes.Structure):
    """``matching::Options``."""

    _fields_ = [
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
        ("rule", ctypes.c_int),
        ("nonnegative", ctypes.c_bool),
        ("ridge", ctypes.c_double),
        ("tolerance", ctypes.c_double),
        ("near_bytes", ctypes.c_size_t),
        ("fill", ctypes.c_bool),
    ]


class Problem(ctypes.Structure):
    """``matching::Problem``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("gram", "inner", "target_sq", "valid")]


class Answer(ctypes.Structure):
    """``matching::Answer``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("indices", "weights", "count", "residual", "status")]


class Sizes(NamedTuple):
    """Of a block: csrc/matching/workspace.hpp and kernels.cuh."""

    threads: int
    arrays: int  # bytes of shared memory without the tableau
    tableau: int  # bytes
    spacing: int  # bytes from one tableau in global memory to the next


def _lines(size: int) -> int:
    return (size + 63) // 64 * 64


def sizes(n: int, k: int, is_double: bool) -> Sizes:
    """What a block of ``match_blocks`` wants for a problem."""
    rows, item, best = min(k, n), 8 if is_double else 4, 16 if is_double else 12
    count = (n + WARP - 1) // WARP * WARP + (rows + WARP - 1) // WARP * WARP
    tableau = count * (rows | 1) * item
    arrays = max(rows, 64) * 8 + (5 * count + 4 * rows) * item + 2 * rows * 4
    return Sizes(min(count or WARP, MOST_THREADS), _lines(2 * WARP * best) + _lines(arrays), tableau, _lines(tableau))


class Loaded:
    """The kernels of a unit on one device, compiled and loaded. Raises RuntimeError where that cannot be."""

    def __init__(self, device: int, unit: str) -> None:
        properties = torch.cuda.get_device_properties(device)
        self._shared = int(getattr(properties, "shared_memory_per_block_optin", 48 << 10))  # what any device has
        compiler = _nvrtc.Compiler(torch.version.cuda.split(".")[0] if torch.version.cuda else None)
        target = compiler.target(10 * properties.major + properties.minor)
        self._driver = driver()
        self._architecture = f"{target}, by NVRTC {compiler.version}"
        handle, module = ctypes.c_int(), ctypes.c_void_p()
        self._context = ctypes.c_void_p()  # torch's own; never released
        self._check(self._driver.cuDeviceGet(ctypes.byref(handle), device))
        self._check(self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle))
        code = _nvrtc.compiled(compiler, unit, target)
        self._functions: dict[str, ctypes.c_void_p] = {}
        with self._current():
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), code.image))
            for kernel, name in code.names.items():
                function = ctypes.c_void_p()
                self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
                self._functions[kernel] = function

    def architectures(self) -> str:
        """What the kernels are compiled for."""
        return self._architecture

    def _launch(self, kernel: str, blocks: int, threads: int, shared: int, stream: int, *arguments: int) -> None:
        """Launch with the arguments at these addresses."""
        pointers = (ctypes.c_void_p * len(arguments))(*arguments)
        function, queue = self._functions[kernel], ctypes.c_void_p(stream)
        with self._current():
            self._check(self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared))
            self._check(
                self._driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, queue, pointers, None)
            )

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's primary context, which a thread that has not used the runtime yet does not have."""
        self._check(self._driver.cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            self._check(self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())))

    def _check(self, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            kind = PassingError if status in PASSING else RuntimeError
            raise kind(f"CUDA driver: {(text.value or b'unknown error').decode()} ({status})")


class Core(Loaded):
    """The solver of one type."""

    def __init__(self, device: int, is_double: bool) -> None:
        super().__init__(device, "double" if is_double else "float")
        self._is_double = is_double

    def fits(self, n: int, k: int) -> bool:
        """Whether a block can hold the problem's arrays."""
        return sizes(n, k, self._is_double).arrays <= self._shared

    def match_workspace(self, batch: int, is_double: bool, n: int, k: int, device: int) -> int:
        """Bytes of global memory that :meth:`match` wants."""
        wanted = sizes(n, k, is_double)
        return 0 if wanted.arrays + wanted.tableau <= self._shared else batch * wanted.spacing

    def match(
        self,
        buffers: Sequence[int],
        is_double: bool,
        batch: int,
        n: int,
        k: int,
        rule: int,
        nonnegative: bool,
        ridge: float,
        tolerance: float,
        fill: bool,
        workspace: int,
        device: int,
        stream: int,
    ) -> None:
        """Solve ``batch`` problems at these addresses on ``stream``."""
        wanted = sizes(n, k, is_double)
        shared = wanted.arrays + wanted.tableau <= self._shared
        size = wanted.arrays + (wanted.tableau if shared else 0)
        arguments: list[Any] = [
            Options(n, k, rule, nonnegative, ridge, tolerance, 64 << 10, fill),
            Problem(*buffers[:4]),
            Answer(*buffers[4:]),
            ctypes.c_void_p(None if shared else workspace),
        ]
        addresses = (ctypes.addressof(argument) for argument in arguments)
        self._launch("shared" if shared else "global", batch, wanted.threads, size, stream, *addresses)


class Choice(Loaded):
    """The kernels of csrc/selection."""

    def __init__(self, device: int) -> None:
        super().__init__(device, "choice")

    def launch_choice(
        self, kernel: int, problem: int, size: int, threads: int, shared: int, device: int, stream: int
    ) -> None:
        """Launch one block with the structure of ``size`` bytes at ``problem``."""
        self._launch(_nvrtc.CHOICES[kernel], 1, threads, shared, stream, problem)


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library, which torch has loaded."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _nvrtc.Unavailable(f"the driver's library does not load: {error}") from None


@kept
def core(device: int, is_double: bool) -> Core | str:
    """The solver for a device and a type, or why there is none. The first call compiles: some seconds."""
    return _made(lambda: Core(device, is_double))


@kept
def choice(device: int) -> Choice | str:
    """The kernels that choose rows on a device, or why there are none. The first call compiles: some seconds."""
    return _made(lambda: Choice(device))


def _made(make: Callable[[], _T]) -> _T | str:
    if torch.version.hip is not None:
        return "NVRTC is for NVIDIA's GPUs"
    try:
        return make()
    except PassingError:
        raise
    except (_nvrtc.Unavailable, OSError, RuntimeError, AttributeError) as error:
        return str(error)
