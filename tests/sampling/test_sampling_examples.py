"""The docstrings' examples run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["batches", "named", "noise", "proxy", "table"])
def test_examples(module):
    found = doctest.testmod(importlib.import_module(f"selbp.sampling.{module}"))
    assert found.attempted and not found.failed
