"""The operators: functional front over ``torch.ops.selbp.*``."""

from selbp.ops.cube import cube_sample
from selbp.ops.gram import gradient_gram
from selbp.ops.linear_cross_entropy import linear_cross_entropy
from selbp.ops.matching import match
from selbp.ops.matching_residual import matching_residual
from selbp.ops.mean_gradient import mean_gradient
from selbp.ops.nnls import nnls, nnls_gram
from selbp.ops.residual import residual
from selbp.ops.sketch import sketch, sketch_gram, sketch_projections
from selbp.ops.statistics import cross_entropy_statistics, linear_cross_entropy_statistics
from selbp.types import BatchStatistics, Matching, MatchStatus, MeanGradient, Selection

__all__ = [
    "BatchStatistics",
    "MatchStatus",
    "Matching",
    "MeanGradient",
    "Selection",
    "cross_entropy_statistics",
    "cube_sample",
    "gradient_gram",
    "linear_cross_entropy",
    "linear_cross_entropy_statistics",
    "match",
    "matching_residual",
    "mean_gradient",
    "nnls",
    "nnls_gram",
    "residual",
    "sketch",
    "sketch_gram",
    "sketch_projections",
]
