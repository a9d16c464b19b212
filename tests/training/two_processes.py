"""Run a check in two processes that talk over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import multiprocessing


def in_two_processes(check: Callable[[int], None]) -> None:
    """``check(rank)`` in each of two processes of one thread; what one raises is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_work, (check, port), nprocs=2)


def _work(rank: int, check: Callable[[int], None], port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    check(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in std::terminate.
    os._exit(0)
