"""Backward through k rows of a forward that ran on n. Start reading at ``select``; ``docs/rows.md`` is the guide."""

from selbp.training.backward.rows import (  # noqa: F401  (each module registers its rules)
    attention,
    batchnorm,
    elementwise,
    kernels,
    products,
    recurrent,
    scatter,
    shapes,
    strided,
    views,
)
from selbp.training.backward.rows.checkpoint import checkpoint
from selbp.training.backward.rows.layout import BatchNormPolicy, Layout, RowSet
from selbp.training.backward.rows.registry import RULES, TABLE, NoRuleError
from selbp.training.backward.rows.select import fence, select
from selbp.training.backward.rows.tensor import RowGradient

__all__ = [
    "RULES",
    "TABLE",
    "BatchNormPolicy",
    "Layout",
    "NoRuleError",
    "RowGradient",
    "RowSet",
    "checkpoint",
    "fence",
    "select",
]
