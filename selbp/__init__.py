"""selbp: train a PyTorch model on a chosen, weighted part of each minibatch."""

import torch  # noqa: F401  (first: the native core binds to the OpenMP runtime that torch has loaded)

from selbp._sources import stale
from selbp._version import __version__

try:
    import selbp._native
except ImportError as error:
    if str(error).startswith("SELBP_CPU_LEVEL"):
        raise
    raise ImportError(
        "selbp's native extension is not built. Install the package (`pip install .` in the project's folder, or "
        f"`pip install -e .` to develop) and import it from there. The import said: {error}"
    ) from error
if _stale := stale(getattr(selbp._native, "SOURCES", "")):
    raise ImportError(_stale)

from selbp.selectors import (  # noqa: E402
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
from selbp.training import Schedule, SelectiveBackprop, StepReport  # noqa: E402
from selbp.training.backward.rows import checkpoint, fence, select  # noqa: E402
from selbp.training.cut import CutReport, SelectiveBackward, selective_backward  # noqa: E402
from selbp.training.cut_insert import InsertedCut, insert_cut  # noqa: E402
from selbp.training.diagnose import Diagnosis, diagnose  # noqa: E402
from selbp.training.memory import keep_freed_memory  # noqa: E402
from selbp.training.recommended import recommended  # noqa: E402

__all__ = [
    "BatchStatistics",
    "CubeSampling",
    "CutReport",
    "Diagnosis",
    "DivBS",
    "Full",
    "GradNormImportance",
    "GradientMatching",
    "GradientProxies",
    "InsertedCut",
    "LossPercentile",
    "LossRank",
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
    "checkpoint",
    "diagnose",
    "fence",
    "insert_cut",
    "keep_freed_memory",
    "recommended",
    "select",
    "selective_backward",
]
