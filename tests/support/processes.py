"""Processes that start in milliseconds: forked from a server that has imported torch and both packages once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class Ended(NamedTuple):
    """How a process ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def context() -> ForkServerContext:
    """For processes of which only what they do is tested, not how they come to be."""
    found = multiprocessing.get_context("forkserver")
    # torch._dynamo is what DistributedDataParallel imports when one is made.
    found.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", "selbp", "selbp_study.cli"])
    return found


def run(target: Callable[..., Any], *args: Any) -> Ended:
    """``target(*args)``, a function of a module, in a process of one thread; ``SystemExit`` gives its status."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        process = context().Process(target=_redirected, args=(files, target, args))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ended(process.exitcode, *(file.read_text() for file in files))


def _redirected(files: list[Path], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    target(*args)


def in_two_processes(check: Callable[[int], None]) -> None:
    """:func:`in_processes`, two of them."""
    in_processes(2, check)


def in_processes(count: int, check: Callable[[int], None]) -> None:
    """``check(rank)`` in each of ``count`` processes of one thread that talk over gloo; what one raises is raised here.

    They meet in a file of their own: a port that is free now may be taken when the first of them binds it.
    """
    context()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (count, check, Path(folder, "meeting").as_uri())
        torch.multiprocessing.start_processes(_work, arguments, nprocs=count, start_method="forkserver")


def _work(rank: int, count: int, check: Callable[[int], None], meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)
    check(rank)
    dist.barrier()
    dist.destroy_process_group()
    # Past the interpreter's end: a thread of gloo that asks for the GIL while Python finalizes ends in std::terminate.
    os._exit(0)
