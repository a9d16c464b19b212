"""Choosing before anything is read or run: a table of scores, batches drawn by it, and a loss for wrong labels.

Below :mod:`selbp.training`, which takes a table as ``table=``; it knows nothing of steps.
"""

from selbp.sampling.auto import AutoSelect
from selbp.sampling.batches import ScoredBatchSampler
from selbp.sampling.candidates import Candidate, Decision
from selbp.sampling.issued import Draw
from selbp.sampling.known import Suspects
from selbp.sampling.named import InfoBatchSampler, info_batch, rho_loss
from selbp.sampling.noise import NoiseAwareCrossEntropy, noise_aware
from selbp.sampling.proxy import Proxy, fit_proxy
from selbp.sampling.table import ScoreTable
from selbp.sampling.table_sampler import TableSampler

__all__ = [
    "AutoSelect",
    "Candidate",
    "Decision",
    "Draw",
    "InfoBatchSampler",
    "NoiseAwareCrossEntropy",
    "Proxy",
    "ScoreTable",
    "ScoredBatchSampler",
    "Suspects",
    "TableSampler",
    "fit_proxy",
    "info_batch",
    "noise_aware",
    "rho_loss",
]
