"""A small learnable data set, made on the fly, and a configuration that trains on it in a second."""

from __future__ import annotations

import pytest
import torch
from support.images import small_dataset

from selbp_study.config import RunConfig
from selbp_study.data import Dataset, Text


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return small_dataset()


@pytest.fixture(scope="session")
def text() -> Dataset:
    """Sequences over seven characters, each the one before plus 1 or, by chance, 2."""
    steps = torch.randint(0, 6, (400, 9), generator=torch.Generator().manual_seed(0)).eq(0).long() + 1
    codes = steps.cumsum(1).remainder(7)
    parts = [Text(part[:, :-1].to(torch.uint8), part[:, 1:].contiguous()) for part in (codes[:300], codes[300:])]
    return Dataset("small-text", parts[0], parts[1], 7, "made on the fly")


@pytest.fixture
def config(dataset: Dataset) -> RunConfig:
    return RunConfig(
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        selector="matching",
        steps=30,
        lr=0.1,
        batch_size=32,
        keep=0.25,
        model="mlp",
        evaluate_every=10,
        threads=1,
    )
