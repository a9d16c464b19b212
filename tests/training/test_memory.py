"""The allocator's setting, in processes of their own: it cannot be undone."""

import platform
import subprocess
import sys

import pytest

# What glibc keeps is read from its own books (`arena`: bytes taken from the system other than by mmap): the system's
# count of page faults is not there in every sandbox.
PROGRAM = """
import ctypes, sys, torch, selbp
class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert selbp.keep_freed_memory()
for _ in range(3):  # as a forward does: activations taken one by one, and freed together
    held = [torch.ones(1 << 21) for _ in range(16)]
    del held
read = ctypes.CDLL(None).mallinfo2
read.restype = Books
print(read().arena)
"""


def kept(how: str) -> int:
    """Bytes that the heap still holds when 128 MiB of blocks have been freed."""
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [int(part) for part in platform.libc_ver()[1].split(".")] < [2, 33],
    reason="mallinfo2 of glibc 2.33",
)
def test_freed_blocks_stay_in_the_heap() -> None:
    activations = 16 * 4 * (1 << 21)
    assert kept("keep") >= activations
    # The heap cannot shrink below a block that happens to lie at its end: where it does is drawn anew in each process.
    assert any(kept("as it is") < activations for _ in range(5))
