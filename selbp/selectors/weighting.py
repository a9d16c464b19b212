"""The weights of chosen rows."""

from __future__ import annotations

from torch import Tensor

from selbp.ops.types import BatchStatistics


def mean_weights(stats: BatchStatistics, real: Tensor) -> Tensor:
    """(k,) equal weights v / (n m) for m real slots and v valid rows, 0 for spare ones: 1 / k where every row is valid.

    The target is the mean over n rows of which v have a gradient, so v / n is the share that m rows stand for. With
    every valid row chosen the weights are those of the whole minibatch, 1 / n.
    """
    n = stats.valid.shape[0]
    dtype = stats.loss.dtype
    return real * (stats.valid.sum().to(dtype) / (n * real.sum().clamp(min=1)))
