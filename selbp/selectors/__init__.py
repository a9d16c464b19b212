"""Selection rules: which k rows of a minibatch run backward, and with what weights.

Data flows downward only: a selector reads statistics and proxies that :mod:`selbp.ops` computes, and knows nothing
of models or training. One file per family; :mod:`selbp.selectors.base` says what a rule offers.
"""

from selbp.selectors.base import BaseSelector, Needs, Selector
from selbp.selectors.candidates import Candidates
from selbp.selectors.cube import CubeSampling
from selbp.selectors.diverse import DivBS
from selbp.selectors.importance import GradNormImportance
from selbp.selectors.loss_sampling import LossPercentile, LossRank
from selbp.selectors.matching import GradientMatching
from selbp.selectors.proxies import GradientProxies
from selbp.selectors.top import ReducibleLoss, TopGradNorm, TopLoss
from selbp.selectors.uniform import Full, Random
from selbp.types import BatchStatistics, Selection

__all__ = [
    "BaseSelector",
    "BatchStatistics",
    "Candidates",
    "CubeSampling",
    "DivBS",
    "Full",
    "GradNormImportance",
    "GradientMatching",
    "GradientProxies",
    "LossPercentile",
    "LossRank",
    "Needs",
    "Random",
    "ReducibleLoss",
    "Selection",
    "Selector",
    "TopGradNorm",
    "TopLoss",
]
