"""The allocator's setting, in processes of their own: it cannot be undone."""

import os
import platform
import subprocess
import sys

import pytest

# What glibc keeps is read from its own books (`arena`: bytes taken from the system other than by mmap, `hblkhd`: by
# mmap): the system's count of page faults is not there in every sandbox.
PROGRAM = """
import ctypes, sys, torch, selbp
class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
read = ctypes.CDLL(None).mallinfo2
read.restype = Books
torch.set_num_threads(1)
how, blocks, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if how == "keep":
    assert selbp.keep_freed_memory()
before = read()
for _ in range(3):  # as a forward does: activations taken one by one, and freed together
    held = [torch.ones(size // 4) for _ in range(blocks)]
    del held
after = read()
print(after.arena, after.arena + after.hblkhd - before.arena - before.hblkhd)
"""
MIB = 1 << 20


def kept(how: str, blocks: int, size: int) -> tuple[int, int]:
    """Bytes that the heap holds when ``blocks`` of ``size`` bytes were freed, and by how much all grew over that."""
    command = [sys.executable, "-c", PROGRAM, how, str(blocks), str(size)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600, env=plain)
    arena, growth = map(int, done.stdout.split())
    return arena, growth


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or [int(part) for part in platform.libc_ver()[1].split(".")] < [2, 33],
    reason="mallinfo2 of glibc 2.33",
)
def test_freed_blocks_stay_in_the_heap() -> None:
    arena, _ = kept("keep", 16, 8 * MIB)
    assert arena >= 16 * 8 * MIB
    # Left alone, glibc returns every block above 32 MiB at once. Smaller ones may lie in the heap, which cannot shrink
    # below a block that happens to lie at its end: where it does is drawn anew in each process.
    _, growth = kept("as it is", 2, 64 * MIB)
    assert growth < 64 * MIB
