"""Real data sets, read with checks, fetched without root where they are not there."""

from selbp_study.data.changes import CHANGES, resolve
from selbp_study.data.datasets import (
    BIBLE,
    DIGITS,
    FASHION_MNIST,
    HELD_OUT,
    NAMES,
    Dataset,
    Split,
    Text,
    cache_folder,
    load,
    make_dataset,
)
from selbp_study.data.idx import DataError

__all__ = [
    "BIBLE",
    "CHANGES",
    "DIGITS",
    "FASHION_MNIST",
    "HELD_OUT",
    "NAMES",
    "DataError",
    "Dataset",
    "Split",
    "Text",
    "cache_folder",
    "load",
    "make_dataset",
    "resolve",
]
