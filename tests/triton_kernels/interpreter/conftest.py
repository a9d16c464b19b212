"""Tests of the Triton kernels in Triton's interpreter, which needs a process of its own (TRITON_INTERPRET=1)."""

import os
import warnings

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    # tests/triton_kernels/test_interpreter.py starts the process that collects this folder.
    collect_ignore_glob = ["*.py"]
else:
    from support import triton_guard

    triton_guard.install()
    warnings.filterwarnings("ignore", message="All-NaN slice encountered")


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan():
    """torch.empty is filled with NaN, so that an output that no program writes cannot pass for a result."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
