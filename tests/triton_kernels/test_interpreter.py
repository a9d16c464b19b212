"""Runs the interpreter tests in a process of their own: TRITON_INTERPRET is read once, when Triton is imported."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6 or newer")
FOLDER = pathlib.Path(__file__).parent / "interpreter"


def run(selection):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-m",
        selection,
        str(FOLDER),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER.parents[2])
    print(done.stdout)
    assert done.returncode == 0, f"interpreter tests failed:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"


def test_kernels_in_the_interpreter():
    run("not slow")


@pytest.mark.slow
def test_every_kernel_case_in_the_interpreter():
    run("slow")
