"""Compiles C++ for tests. Objects and programs are kept by a hash of everything that goes into them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "tests"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
Unit = tuple[Path, Sequence[str], Sequence[Path]]  # source, flags, include folders


def start(source: Path, flags: Sequence[str], folders: Sequence[Path]) -> tuple[Path, Callable[[], None] | None]:
    """The object file of ``source``, and what waits for its compilation: None where the cache has it."""
    key = hashlib.sha256(repr((COMPILER, flags)).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".hpp", ".cuh", ".cpp")):
            key.update(repr((str(file.relative_to(folder)), file.read_bytes())).encode())
    key.update(Path(source).read_bytes())
    target = CACHE / f"{Path(source).stem}-{key.hexdigest()[:24]}.o"
    if target.exists():
        return target, None
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(f".{os.getpid()}.o")
    command = [COMPILER, *flags, *(f"-I{folder}" for folder in folders), "-c", str(source), "-o", str(scratch)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def finish() -> None:
        _, errors = job.communicate(timeout=600)
        assert job.returncode == 0, errors
        os.replace(scratch, target)

    return target, finish


def compile_all(units: Sequence[Unit]) -> list[Path]:
    """The object files of ``units``, compiled side by side; skips the test where there is no compiler."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    objects = [start(*unit) for unit in units]
    for _, finish in objects:
        if finish:
            finish()
    return [target for target, _ in objects]


def link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """The program, or with ``-shared`` the library, of ``objects``."""
    names = [str(target) for target in objects]
    program = CACHE / f"{name}-{hashlib.sha256(repr((names, flags)).encode()).hexdigest()[:24]}"
    if not program.exists():
        scratch = program.with_name(f"{program.name}.{os.getpid()}")
        subprocess.run([str(COMPILER), *names, *flags, "-o", str(scratch)], check=True, timeout=600)
        os.replace(scratch, program)
    return program


def patched(folder: Path, *changes: tuple[str, str, str]) -> Path:
    """A copy of csrc/ in ``folder``: for each (file, before, after), the one ``before`` in ``file`` reads ``after``."""
    shutil.copytree(ROOT / "csrc", folder)
    for file, before, after in changes:
        source = folder / file
        text = source.read_text()
        assert text.count(before) == 1, f"{file} no longer has exactly one {before!r}: plant the bug anew"
        source.write_text(text.replace(before, after))
    return folder
