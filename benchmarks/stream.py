"""What this machine's memory delivers: two loops in C++, compiled when a benchmark first asks for them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch import Tensor

SOURCE = Path(__file__).parent / "native" / "stream.cpp"
FOLDER = Path(__file__).parents[1] / "build" / "benchmarks"
OPTIONS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wall", "-Wextra"]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled loops. Raises RuntimeError where there is no compiler or it refuses."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the roofline's memory loops need a C++ compiler: install g++, or name one in CXX")
    command = [*compiler.split(), *OPTIONS]
    # Of this processor and compiler alone: -march=native.
    name = hashlib.blake2b(SOURCE.read_bytes() + repr((command, os.uname())).encode(), digest_size=8).hexdigest()
    target = FOLDER / f"stream-{name}.so"
    if not target.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FOLDER) as folder:  # two runs at once each build, and the last one stays
            built = Path(folder) / "stream.so"
            said = subprocess.run([*command, str(SOURCE), "-o", str(built)], capture_output=True, text=True)
            if said.returncode:
                raise RuntimeError(f"{' '.join(command)} could not compile {SOURCE}:\n{said.stderr}")
            built.replace(target)
    found = ctypes.CDLL(str(target))
    address, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.selbp_stream_read.argtypes = [address, count, number, number]
    found.selbp_stream_copy.argtypes = [address, address, count, number, number]
    found.selbp_stream_read.restype = found.selbp_stream_copy.restype = None
    return found


def read(source: Tensor, repeats: int, threads: int) -> None:
    """Read all of ``source``, contiguous float32 on the CPU, ``repeats`` times."""
    library().selbp_stream_read(source.data_ptr(), source.numel(), repeats, threads)


def copy(target: Tensor, source: Tensor, repeats: int, threads: int) -> None:
    """Copy ``source`` into ``target``, both contiguous float32 of one size on the CPU, ``repeats`` times."""
    library().selbp_stream_copy(target.data_ptr(), source.data_ptr(), source.numel(), repeats, threads)
