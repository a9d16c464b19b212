"""Fixtures: every rule in turn, and a minibatch with known gradients."""

import dataclasses

import pytest
from support.selection_cases import EVERY_RULE, Batch


@pytest.fixture(params=EVERY_RULE, ids=repr)
def rule(request):
    """A fresh rule of every kind and mode."""
    return dataclasses.replace(request.param)


@pytest.fixture
def batch():
    return Batch()
