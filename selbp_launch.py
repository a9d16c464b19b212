"""Entry of the ``selbp`` command: what must be settled before torch is imported, and nothing else.

OpenMP's default is to spin at the end of each parallel region. With as many threads as cores, one other busy process
is then enough to make every region wait for a whole time slice (a training step of 10 ms took 600). Sleeping instead
costs a few microseconds a region. An environment that says anything of its own is left alone.
"""

import os


def main() -> int:
    """Run the command line; returns the exit status."""
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from selbp.cli import main as command

    return command()
