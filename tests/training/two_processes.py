"""Run a check in some processes that talk over gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def in_two_processes(check: Callable[[int], None]) -> None:
    """:func:`in_processes`, two of them."""
    in_processes(2, check)


def in_processes(count: int, check: Callable[[int], None]) -> None:
    """``check(rank)`` in each of ``count`` processes of one thread; what one raises is raised here.

    They meet in a file of their own: a port that is free now may be taken when the first of them binds it.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_work, (count, check, Path(folder, "meeting").as_uri()), nprocs=count)


def _work(rank: int, count: int, check: Callable[[int], None], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    check(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in std::terminate.
    os._exit(0)
