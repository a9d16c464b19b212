"""Choosing before anything is read or run: a table of scores, batches drawn by it, and a loss for wrong labels.

Below :mod:`selbp.training`, which takes a table as ``table=``; it knows nothing of steps.
"""

from selbp.sampling.batches import ScoredBatchSampler, TableSampler
from selbp.sampling.issued import Draw
from selbp.sampling.noise import NoiseAwareCrossEntropy, noise_aware
from selbp.sampling.table import ScoreTable, Suspects

__all__ = [
    "Draw",
    "NoiseAwareCrossEntropy",
    "ScoreTable",
    "ScoredBatchSampler",
    "Suspects",
    "TableSampler",
    "noise_aware",
]
