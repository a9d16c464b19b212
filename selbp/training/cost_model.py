"""Modelled seconds of a step on a CPU: what ``backward="auto"`` and ``diagnose`` compare strategies by.

FLOPs alone flatter a backward through rows of a small network, where each operator's Python, and the copies of saved
rows, cost as much as the second forward that they replace. So three things are added up: an operator's FLOPs or bytes,
whichever take longer; a fixed time for every call; and the copies. The rates below were fitted once, to six networks on
one machine (AMD EPYC, 1 thread, see docs/measurements/rows.md). A model and not a measurement, because a run that chose
by a clock would not be the same run twice; near the point where the strategies cost the same, choosing wrongly costs
little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selbp import allocator, ops  # noqa: F401  the operators are registered by their import

FLOPS = 95e9  # per second and thread, float32 products
CONVOLUTION_FLOPS = 200e9  # the same of convolutions, whose kernels are oneDNN's own
BYTES = 17e9  # per second and thread, of operators that read and write activations
COPIED = 9e9  # per second, of saved rows, where freed memory is kept
FAULTED = 4e9  # the same where the allocator returns it and every copy's pages are faulted in
CALL = 6e-6  # seconds, of an operator of a network whose tensors evict torch's own code from the cache
ROW_CALL = 55e-6  # seconds, of an operator on a row gradient: dispatch, rule and wrapper, in Python


def _forward(features: Tensor, weight: Tensor, *_: Any, **__: Any) -> float:
    return 2.0 * features.numel() * len(weight)


def _backward(gradient: Tensor, features: Tensor, weight: Tensor, *others: Any, **__: Any) -> float:
    needs_features, needs_weight, _ = others[-3:]
    again = not others[5].numel()  # the logits, where they were not kept
    return _forward(features, weight) * (again + needs_features + needs_weight)


# FLOPs of this package's differentiable operators, in the form of torch's `flop_registry`.
OWN = {
    torch.ops.selbp.linear_cross_entropy: _forward,
    torch.ops.selbp.linear_cross_entropy_backward: _backward,
}


@dataclass
class Work:
    """Seconds and calls of a group of operators, on all n rows."""

    seconds: float = 0.0
    calls: int = 0

    def add(self, flops: float, nbytes: float, convolves: bool, threads: int) -> float:
        """One call of an operator; returns its seconds."""
        seconds = max(flops / (CONVOLUTION_FLOPS if convolves else FLOPS), nbytes / BYTES) / threads
        self.seconds += seconds
        self.calls += 1
        return seconds


@dataclass(frozen=True)
class Rates:
    """Where the step runs, as far as the model knows."""

    threads: int
    kept: bool  # freed memory stays with the process

    @classmethod
    def here(cls) -> Rates:
        """The process as it is now."""
        return cls(torch.get_num_threads(), allocator.kept())


def modelled(forward: Work, rows: Work, dense: Work, saved_bytes: int, share: float, rates: Rates) -> dict[str, float]:
    """Seconds of a step by strategy, k / n = ``share``, and of the forward of all rows.

    Args:
        forward: of all rows.
        rows: the backward's operators that can run on k rows.
        dense: those that run on n rows below a row gradient.
        saved_bytes: what the forward saves, each sample's share of which is copied once.
        share: k / n.
        rates: of this process.
    """
    ahead, backward = forward.seconds + CALL * forward.calls, rows.seconds + dense.seconds
    calls = CALL * (rows.calls + dense.calls)
    copies = share * saved_bytes / (COPIED if rates.kept else FAULTED)
    return {
        "forward": ahead,
        "full": ahead + backward + calls,
        "recompute": ahead + share * (forward.seconds + backward) + CALL * forward.calls + calls,
        "rows": ahead + share * rows.seconds + dense.seconds + ROW_CALL * rows.calls + CALL * dense.calls + copies,
    }
