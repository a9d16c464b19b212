"""Builds and runs the programs that emulate CUDA threads; see shim/cuda_shim.hpp."""

import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_emulation"  # objects and programs, by the hash of all that goes into them
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

# -O1: a compiler that copies a barrier into two branches would give one barrier two places.
COMMON = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-optimize-sibling-calls",
          "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror"]  # fmt: skip
ADDRESS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-g", "-fsanitize=thread"]
SANITIZERS = {"address": (ADDRESS, ADDRESS), "thread": (THREAD, ["-DSHIM_TSAN"])}  # of the kernels, of the scheduler


def machine_flags():
    """A fused multiply-add in hardware, where the CPU has one: without it, the teams round a*b + c twice."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    return ["-mavx2", "-mfma", "-mbmi2"] if {"avx2", "fma", "bmi2"} <= set(flags) else []


def compile_unit(source, flags, folders):
    """The object file of ``source``, from the cache where nothing that goes into it has changed."""
    key = hashlib.sha256(repr((COMPILER, flags)).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".hpp", ".cuh")):
            key.update(repr((str(file.relative_to(folder)), file.read_bytes())).encode())
    key.update(Path(source).read_bytes())
    target = CACHE / f"{Path(source).stem}-{key.hexdigest()[:24]}.o"
    if target.exists():
        return target, None
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.o")
    command = [COMPILER, *flags, *(f"-I{folder}" for folder in folders), "-c", str(source), "-o", str(scratch)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def finish():
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors
        os.replace(scratch, target)

    return target, finish


def link(name, units, flags):
    """The program of ``units``, (source, flags, include folders) each; compiled side by side."""
    if COMPILER is None:
        pytest.skip("no C++ compiler to build the emulation with")
    objects = [compile_unit(*unit) for unit in units]
    for _, finish in objects:
        if finish:
            finish()
    names = [str(target) for target, _ in objects]
    program = CACHE / f"{name}-{hashlib.sha256(repr((names, flags)).encode()).hexdigest()[:24]}"
    if not program.exists():
        scratch = program.with_name(f"{program.name}.{os.getpid()}")
        subprocess.run([COMPILER, *names, *flags, "-o", str(scratch)], check=True, timeout=600)
        os.replace(scratch, program)
    return program


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
    return link(Path(main).stem, units, (*kernels, *(["-lgomp"] if host else [])))


def run(program, *arguments, text="", seconds=600):
    """(exit status, standard output, standard error)."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
    }
    done = subprocess.run(
        [str(program), *map(str, arguments)], input=text, env={**os.environ, **options},
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def patched(folder, file, before, after):
    """A copy of csrc/ in ``folder`` in which ``before`` in ``file``, which must stand there once, reads ``after``."""
    shutil.copytree(ROOT / "csrc", folder)
    source = folder / file
    text = source.read_text()
    assert text.count(before) == 1, f"{file} no longer has exactly one {before!r}: plant the bug anew"
    source.write_text(text.replace(before, after))
    return folder
