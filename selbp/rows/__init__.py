"""Backward through k rows of a forward that ran on n.

Start reading at ``select``. ``docs/developer/rows.md`` explains how it works.
"""

from selbp.rows.checkpoint import checkpoint
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import BatchNormPolicy, Layout, RowSet
from selbp.rows.registry import RULES, TABLE, NoRuleError
from selbp.rows.rules import (  # noqa: F401  (each module registers its rules)
    attention,
    batchnorm,
    elementwise,
    gather_scatter,
    own,
    per_sample,
    products,
    recurrent,
    shapes,
    strided,
    views,
)
from selbp.rows.select import fence, select

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
