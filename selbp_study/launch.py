"""Entry of the ``selbp`` command: what is settled for the whole process, and nothing else.

OpenMP's default is to spin at the end of each parallel region. With as many threads as cores, one other busy process
is then enough to make every region wait for a whole time slice (a training step of 10 ms took 600). Sleeping instead
costs a few microseconds a region. An environment that says anything of its own is left alone.

glibc's default is to return freed memory and fault it in again in every step; the process is the command's own, so it
keeps it (see ``selbp.keep_freed_memory``).
"""

import os
import sys


def main() -> int:
    """Run the command line; returns the exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch is imported
    from selbp import keep_freed_memory
    from selbp_study.cli import main as command

    keep_freed_memory()
    status = command()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in
        # std::terminate.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
