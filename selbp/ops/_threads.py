"""How many threads a native kernel may use: torch's own setting, and one after a fork.

libgomp's worker threads do not survive ``fork``: a child of a process that has run a parallel region would wait for
them for ever, so a forked process (a DataLoader worker, say) runs the native kernels serially.
"""

from __future__ import annotations

import os

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def native_threads(work: int | None = None, grain: int = 32768) -> int:
    """Threads for a native kernel that does ``work`` units, at least ``grain`` of them on each thread."""
    if _forked:
        return 1
    threads = torch.get_num_threads()
    return threads if work is None else max(1, min(threads, work // grain))
