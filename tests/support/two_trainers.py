"""Run a check in two processes that the frameworks take for two that a launcher started."""

from __future__ import annotations

import os
from collections.abc import Callable

from support.processes import in_two_processes


def launched(check: Callable[[int], None]) -> None:
    """``check(rank)`` in each of two processes over gloo, with the variables that ``torchrun`` sets."""
    in_two_processes(_Launched(check))


class _Launched:
    def __init__(self, check: Callable[[int], None]) -> None:
        self._check = check

    def __call__(self, rank: int) -> None:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
            "ACCELERATE_USE_CPU": "true",
        }
        self._check(rank)
