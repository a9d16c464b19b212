"""selbp: train a PyTorch model on a chosen, weighted part of each minibatch."""

from selbp import _load  # noqa: F401  (before the rest: torch, then the native core)
from selbp._version import __version__
from selbp.allocator import keep_freed_memory
from selbp.cut.insert import InsertedCut, insert_cut
from selbp.cut.module import BackwardCut, backward_cut
from selbp.cut.report import CutReport
from selbp.rows import checkpoint, fence, select
from selbp.sampling import AutoSelect, NoiseAwareCrossEntropy
from selbp.selectors import (
    BaseSelector,
    BatchStatistics,
    CubeSampling,
    DivBS,
    Full,
    GradientMatching,
    GradientProxies,
    GradNormImportance,
    LossPercentile,
    LossRank,
    Random,
    ReducibleLoss,
    Selection,
    Selector,
    TopGradNorm,
    TopLoss,
)
from selbp.training import Schedule, SelectiveBackprop, StepReport
from selbp.training.automatic import auto_select
from selbp.training.diagnose import diagnose
from selbp.training.diagnosis import Diagnosis
from selbp.training.graphed import GraphedStep, cuda_graph
from selbp.training.recommended import recommended

SelectiveBackward, selective_backward = BackwardCut, backward_cut  # their names before 0.1

__all__ = [
    "AutoSelect",
    "BackwardCut",
    "BaseSelector",
    "BatchStatistics",
    "CubeSampling",
    "CutReport",
    "Diagnosis",
    "DivBS",
    "Full",
    "GradNormImportance",
    "GradientMatching",
    "GradientProxies",
    "GraphedStep",
    "InsertedCut",
    "LossPercentile",
    "LossRank",
    "NoiseAwareCrossEntropy",
    "Random",
    "ReducibleLoss",
    "Schedule",
    "Selection",
    "SelectiveBackprop",
    "SelectiveBackward",
    "Selector",
    "StepReport",
    "TopGradNorm",
    "TopLoss",
    "__version__",
    "auto_select",
    "backward_cut",
    "checkpoint",
    "cuda_graph",
    "diagnose",
    "fence",
    "insert_cut",
    "keep_freed_memory",
    "ops",
    "recommended",
    "rows",
    "sampling",
    "select",
    "selective_backward",
    "selectors",
]
