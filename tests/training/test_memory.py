"""The allocator's setting, in a process of its own: it cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

# What glibc keeps is read from its own books (`arena`: bytes taken from the system other than by mmap, `hblkhd`: by
# mmap): the system's count of page faults is not there in every sandbox.
PROGRAM = """
import ctypes, torch, selbp
class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
read = ctypes.CDLL(None).mallinfo2
read.restype = Books
torch.set_num_threads(1)
def freed(blocks, mebibytes):
    # As a forward does: blocks are taken one by one, and freed together.
    before = read()
    for _ in range(3):
        held = [torch.ones(mebibytes << 18) for _ in range(blocks)]
        del held
    after = read()
    return after.arena, after.arena + after.hblkhd - before.arena - before.hblkhd
_, growth = freed(2, 64)
assert selbp.keep_freed_memory()
arena, _ = freed(16, 8)
print(growth >> 20, arena >> 20)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [int(part) for part in platform.libc_ver()[1].split(".")] < [2, 33],
    reason="mallinfo2 of glibc 2.33",
)
def test_freed_blocks_stay_in_the_heap() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=plain)
    growth, arena = map(int, done.stdout.split())  # MiB
    # Left alone, glibc returns every block above 32 MiB at once. Smaller ones may lie in the heap, which cannot shrink
    # below a block that happens to lie at its end: where it does is drawn anew in each process.
    assert growth < 64
    assert arena >= 16 * 8
