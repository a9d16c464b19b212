"""The allocator's setting, in processes of their own: it cannot be undone."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch, selbp
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert selbp.keep_freed_memory()
def step():  # as a forward does: activations taken one by one, and freed together
    held = [torch.ones(1 << 21) for _ in range(16)]
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_blocks_are_not_faulted_in_again() -> None:
    assert faults("keep") < 0.01 * faults("as it is")
