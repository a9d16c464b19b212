"""Builds and runs the programs that emulate CUDA threads; see shim/cuda_shim.hpp."""

import os
import platform
import subprocess
from pathlib import Path

from support.compiled import ROOT, compile_all, link

HERE = ROOT / "tests" / "cuda_emulation"

# -O1: a compiler that copies a barrier into two branches would give one barrier two places.
COMMON = [
    "-std=c++17",
    "-O1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-optimize-sibling-calls",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
]
ADDRESS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-g", "-fsanitize=thread"]
SANITIZERS = {"address": (ADDRESS, ADDRESS), "thread": (THREAD, ["-DSHIM_TSAN"])}  # of the kernels, of the scheduler


def machine_flags():
    """A fused multiply-add in hardware, where the CPU has one: without it, the teams round a*b + c twice."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return ["-mavx2", "-mfma", "-mbmi2"] if {"avx2", "fma", "bmi2"} <= set(flags) else []


def build(main, *, csrc=ROOT / "csrc", sanitizer=None, defines=(), host=False):
    """A program of ``main`` and the scheduler; ``csrc`` is where the kernels are, ``host`` adds the CPU's solver."""
    kernels, scheduler = SANITIZERS.get(sanitizer, ([], []))
    shim = HERE / "shim"
    units = [
        (HERE / main, [*COMMON, *machine_flags(), *kernels, *defines], [shim, csrc]),
        (shim / "scheduler.cpp", [*COMMON, *scheduler], [shim]),
    ]
    if host:  # never from a patched csrc
        flags = [*COMMON, *machine_flags(), "-DSELBP_LEVEL=baseline"]
        units.append((ROOT / "csrc" / "matching" / "cpu.cpp", flags, [ROOT / "csrc"]))
    return link(Path(main).stem, compile_all(units), (*kernels, *(["-lgomp"] if host else [])))


def run(program, *arguments, text="", seconds=600):
    """(exit status, standard output, standard error)."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
    }
    done = subprocess.run(
        [str(program), *map(str, arguments)],
        input=text,
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    return done.returncode, done.stdout, done.stderr
