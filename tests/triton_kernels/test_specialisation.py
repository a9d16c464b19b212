"""A batch of another size must not compile a kernel again in the middle of training."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton.tools.tensor_descriptor", reason="needs Triton 3.4 or newer")
SCRIPT = pathlib.Path(__file__).parent / "specialisation.py"


@pytest.fixture(scope="module")
def keys():
    """{kernel: number of keys}, as it is, and with the sizes ``n`` specialised."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_fifty_ragged_batches_compile_each_kernel_twice_at_most(keys):
    found, _ = keys
    assert len(found) == 20
    assert not {name: count for name, count in found.items() if count > 2}


def test_the_count_sees_a_size_that_is_specialised(keys):
    _, found = keys
    assert found["finalize_kernel"] > 2
