"""Real data sets, read with checks, fetched without root where they are not there."""

from selbp.data.datasets import DIGITS, FASHION_MNIST, NAMES, Dataset, Split, cache_folder, load, make_dataset
from selbp.data.idx import DataError

__all__ = [
    "DIGITS", "FASHION_MNIST", "NAMES", "DataError", "Dataset", "Split", "cache_folder", "load", "make_dataset",
]  # fmt: skip
