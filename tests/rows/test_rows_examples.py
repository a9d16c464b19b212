"""The examples in the docstrings of rows and cut run, and print what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    "selbp.rows.select",
    "selbp.rows.checkpoint",
    "selbp.rows.gradient",
    "selbp.cut.module",
    "selbp.training.diagnose",
    "selbp.training.diagnosis",
]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0
