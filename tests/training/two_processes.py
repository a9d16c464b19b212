"""Run a check in two processes that talk over gloo."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def in_two_processes(check: Callable[[int], None]) -> None:
    """``check(rank)`` in each of two processes of one thread; what one raises is raised here."""
    with tempfile.TemporaryDirectory() as directory:  # they meet at a file: no port is chosen that another may take
        multiprocessing.spawn(_work, (check, (Path(directory) / "store").as_uri()), nprocs=2)


def _work(rank: int, check: Callable[[int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    check(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in std::terminate.
    os._exit(0)
