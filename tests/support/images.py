"""Small learnable images, made on the fly, and as the files that a data set is read from."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch

from selbp_study.data import Dataset, make_dataset
from selbp_study.data.idx import UNSIGNED_BYTE


def images_and_labels(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten classes, each a bright pixel pattern of its own in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = torch.randint(0, 120, (n, 8, 8), generator=generator)
    images[torch.arange(n), labels % 8, 1 + labels // 2] += 135
    return images.to(torch.uint8), labels


def small_dataset() -> Dataset:
    """300 images to train on and 100 to test on."""
    return make_dataset("small", images_and_labels(300, 0), images_and_labels(100, 1), 10, "made on the fly")


def write_idx(path: Path, tensor: torch.Tensor) -> None:
    """Write a uint8 tensor as an IDX file, gzipped when the path ends in ``.gz``."""
    header = struct.pack(f">HBB{tensor.ndim}I", 0, UNSIGNED_BYTE, tensor.ndim, *tensor.shape)
    data = header + tensor.contiguous().numpy().tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def write_set(folder: Path, data: Dataset) -> Path:
    """The four files of a data set like MNIST in ``folder``, which is made where it is missing."""
    folder.mkdir(exist_ok=True)
    for prefix, split in (("train", data.train), ("t10k", data.test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", split.inputs)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", split.labels.to(torch.uint8))
    return folder
