"""The documentation's table is that of the rules, and every rule is met by a case."""

from __future__ import annotations

from pathlib import Path

import torch

from selbp.rows import RULES
from selbp.rows.registry import TABLE, overloads
from selbp.rows.rules_table import insert

DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements" / "rows.md"
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# Operators with a rule that came after torch 2.6, the oldest that is supported.
SINCE = {"_fused_rms_norm_backward": (2, 9)}


def test_the_table_is_current() -> None:
    text = DOCUMENT.read_text()
    assert insert(text) == text, "run: python -m selbp.rows.rules_table docs/measurements/rows.md"


def test_every_rule_is_registered_for_an_operator_of_this_torch() -> None:
    assert all(any(overload in RULES for overload in overloads(entry.name)) for entry in TABLE if overloads(entry.name))
    missing = {entry.name for entry in TABLE if not overloads(entry.name)}
    assert missing == {name for name, first in SINCE.items() if TORCH < first}
