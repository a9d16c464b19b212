"""Compiles the CUDA kernels by NVRTC, where the CUDA core was not built, and keeps the machine code on disk.

A dependency of torch's CUDA wheels, NVRTC needs neither nvcc nor a header: kernels.cuh of csrc/matching or
csrc/selection is handed to it with stand-ins for the three standard headers. It runs once for an architecture and a
unit, some seconds; the file it leaves is found again by the hash of the sources, NVRTC's version, the architecture and
the options. The units are ``"float"`` and ``"double"``, the solver of that type, and ``"choice"``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HEADERS = (
    "matching/matching.hpp",
    "matching/engine.hpp",
    "matching/workspace.hpp",
    "matching/feasible.hpp",
    "matching/setup.hpp",
    "matching/lookahead.hpp",
    "matching/kernels.cuh",
    "team/team.hpp",
    "team/block_team.cuh",
    "selection/selection.hpp",
    "selection/block.cuh",
    "selection/choose.cuh",
    "selection/balanced.cuh",
    "selection/diverse.cuh",
    "selection/kernels.cuh",
)
STAND_INS = {
    "math.h": "",  # built in
    "cstddef": "namespace std { using size_t = decltype(sizeof(0)); }",
    "cstdint": "namespace std { using int32_t = int; using int64_t = long long; }",
}
PROGRAM = '#define SELBP_LEVEL device\n#include "matching/kernels.cuh"\n'
CHOICE_PROGRAM = '#define SELBP_LEVEL device\n#include "selection/kernels.cuh"\n'
KERNELS = {"shared": "true", "global": "false"}  # where the tableau is -> the template's argument
CHOICES = ("choose", "balanced", "diverse")  # the kernels of csrc/selection, in the order of selection/cuda.hpp
# As nvcc compiles the core: a product is fused with a sum where the source says so, and only there.
OPTIONS = ("-std=c++17", "-default-device", "-fmad=false", "--ptxas-options=-v")


class Unavailable(RuntimeError):
    """Why NVRTC cannot be used here."""


class Code(NamedTuple):
    """Machine code, or PTX for a device that is newer than NVRTC."""

    image: bytes
    names: dict[str, str]  # kernel -> its name in the image
    said: str  # by the assembler, of registers and spills; "" where the image came from the disk


def source_folder() -> Path:
    """Where the kernels' sources are: installed with the package, or beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda_source", package.parent / "csrc"):
        if (folder / "matching" / "kernels.cuh").exists():
            return folder
    raise Unavailable("the kernels' sources are not installed with the package")


def expressions(unit: str) -> dict[str, str]:
    """The kernels of a unit, by name, as its program writes them."""
    if unit == "choice":
        return {name: f"selbp::device::{name}_kernel" for name in CHOICES}
    return {name: f"selbp::device::match_blocks<{unit}, {shared}>" for name, shared in KERNELS.items()}


def program(unit: str) -> str:
    """What NVRTC is handed for a unit."""
    return CHOICE_PROGRAM if unit == "choice" else PROGRAM


@functools.cache
def sources() -> dict[str, str]:
    """Every header by the name that it is included by."""
    folder = source_folder()
    return {**STAND_INS, **{name: (folder / name).read_text() for name in HEADERS}}


def candidates(major: str | None = None) -> Iterator[Path]:
    """Files that may be NVRTC: those of CUDA ``major`` first, pip's before the toolkit's."""
    folders = [Path(entry) / "nvidia" for entry in sys.path if entry]
    found = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for root in (Path(path) for path in toolkits if path):
        found += [*root.glob("lib64/libnvrtc.so.*"), *root.glob("targets/*/lib/libnvrtc.so.*")]
    yield from sorted(dict.fromkeys(found), key=lambda path: path.suffixes[1:2] != [f".{major}"])
    for version in dict.fromkeys(v for v in (major, "13", "12") if v):
        yield Path(f"libnvrtc.so.{version}")  # wherever the loader looks


def load(path: Path) -> ctypes.CDLL:
    """The library, with its builtins, which lie beside it and which it would look for in the system's folders alone."""
    for builtins in path.parent.glob("libnvrtc-builtins.so*") if path.is_absolute() else ():
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


class Compiler:
    """One NVRTC. Raises :class:`Unavailable` where there is none that works."""

    def __init__(self, major: str | None = None) -> None:
        for path in candidates(major):
            try:
                library = load(path)
                library.nvrtcGetErrorString.restype = ctypes.c_char_p
                high, low = ctypes.c_int(), ctypes.c_int()
                if library.nvrtcVersion(ctypes.byref(high), ctypes.byref(low)) == 0 and high.value >= 12:
                    break
            except (OSError, AttributeError):
                continue
        else:
            raise Unavailable("there is no libnvrtc of CUDA 12 or newer (pip install nvidia-cuda-nvrtc)")
        self._library, self.path, self.version = library, path, f"{high.value}.{low.value}"

    def architectures(self) -> list[int]:
        """Compute capabilities that this NVRTC compiles for, such as 90."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        values = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(values))
        return sorted(values)

    def target(self, capability: int) -> str:
        """``sm_90``, or ``compute_90``, the newest there is, for a device that is newer than this NVRTC."""
        known = [architecture for architecture in self.architectures() if architecture <= capability]
        if not known:
            raise Unavailable(f"NVRTC {self.version} does not compile for sm_{capability}")
        return f"sm_{capability}" if known[-1] == capability else f"compute_{known[-1]}"

    def compile(self, unit: str, target: str) -> Code:
        """The kernels of ``unit`` for ``target``."""
        headers = sources()
        made, count = ctypes.c_void_p(), len(headers)
        texts = (ctypes.c_char_p * count)(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * count)(*(name.encode() for name in headers))
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(made), program(unit).encode(), b"selbp.cu", count, texts, names
            )
        )
        try:
            wanted = expressions(unit)
            for expression in wanted.values():
                self._check(self._library.nvrtcAddNameExpression(made, expression.encode()))
            options = [*OPTIONS, f"-arch={target}"]
            status = self._library.nvrtcCompileProgram(
                made, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
            )
            said = self._text(made, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog").rstrip(b"\0").decode()
            self._check(status, said)
            kind = "CUBIN" if target.startswith("sm_") else "PTX"
            image = self._text(made, f"nvrtcGet{kind}Size", f"nvrtcGet{kind}")
            lowered = {kernel: self._lowered(made, expression) for kernel, expression in wanted.items()}
            return Code(image, lowered, said)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(made))

    def _lowered(self, program: ctypes.c_void_p, expression: str) -> str:
        name = ctypes.c_char_p()
        self._check(self._library.nvrtcGetLoweredName(program, expression.encode(), ctypes.byref(name)))
        return (name.value or b"").decode()

    def _text(self, program: ctypes.c_void_p, size_of: str, content_of: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, size_of)(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, content_of)(program, buffer))
        return buffer.raw

    def _check(self, status: int, said: str = "") -> None:
        if status:
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise Unavailable(f"NVRTC {self.version}: {reason}{f': {said[:2000]}' if said else ''}")


def cache_folder() -> Path:
    """Where machine code is kept: ``$SELBP_CACHE``, or ``selbp`` in the user's cache."""
    chosen = os.environ.get("SELBP_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen) if chosen else Path(home) / "selbp"


def compiled(compiler: Compiler, unit: str, target: str) -> Code:
    """From the disk where a file of these sources is whole; else compiled, and kept where the disk takes it."""
    key = hashlib.sha256(repr((sources(), program(unit), OPTIONS, compiler.version, target, unit)).encode()).hexdigest()
    path = cache_folder() / f"{unit if unit == 'choice' else f'match-{unit}'}-{target}-{key[:32]}.bin"
    with contextlib.suppress(OSError, ValueError, KeyError):
        head, _, image = path.read_bytes().partition(b"\n")
        written = json.loads(head)
        if written["sha256"] == hashlib.sha256(image).hexdigest():
            return Code(image, written["names"], "")
    code = compiler.compile(unit, target)
    head = json.dumps({"sha256": hashlib.sha256(code.image).hexdigest(), "names": code.names}).encode()
    with contextlib.suppress(OSError):  # a read-only home costs the seconds again in the next process
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, scratch = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(head + b"\n" + code.image)
        os.replace(scratch, path)  # whole or not at all: several processes may compile at once
    return code
