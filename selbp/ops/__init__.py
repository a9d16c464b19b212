"""The operators: functional front over ``torch.ops.selbp.*``."""

from selbp.ops.gram import gradient_gram
from selbp.ops.matching import match, nnls, nnls_gram
from selbp.ops.types import BatchStatistics, Matching, MatchStatus, MeanGradient, Selection

__all__ = [
    "BatchStatistics",
    "MatchStatus",
    "Matching",
    "MeanGradient",
    "Selection",
    "gradient_gram",
    "match",
    "nnls",
    "nnls_gram",
]
