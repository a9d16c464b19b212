"""IDX files (the format of MNIST and its kin), plain or gzipped, checked before anything is believed."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

UNSIGNED_BYTE = 0x08
MAX_BYTES = 1 << 31  # refuses a header that asks for more than any data set read here could need


class DataError(Exception):
    """A data set that cannot be had or a file that cannot be believed; the message names it and says why."""


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes with ``ndim`` dimensions into a uint8 tensor.

    Layout (big-endian): two zero bytes, the element type, the number of dimensions, one uint32 a dimension, then the
    elements. A path ending in ``.gz`` is decompressed. Raises :class:`DataError`, which names the file, when it is
    missing, unreadable, truncated, longer than its header says, or of another type or rank.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim:
                raise DataError(f"{path}: truncated: {len(header)} bytes where the header alone takes {4 + 4 * ndim}")
            zero, kind, rank = struct.unpack(">HBB", header[:4])
            if zero != 0 or kind != UNSIGNED_BYTE or rank != ndim:
                raise DataError(
                    f"{path}: not an IDX file of unsigned bytes with {ndim} dimension(s): it begins with "
                    f"0x{header[:4].hex()}, not 0x0000{UNSIGNED_BYTE:02x}{ndim:02x}"
                )
            shape = struct.unpack(f">{ndim}I", header[4:])
            expected = math.prod(shape)
            if expected > MAX_BYTES:
                raise DataError(f"{path}: the header asks for {shape}, which is not believable")
            body = file.read(expected + 1)  # one more, to notice what the header does not announce
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: corrupt or truncated gzip file: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(body) != expected:
        state = "truncated" if len(body) < expected else "too long"
        found = str(len(body)) if len(body) < expected else f"more than {expected}"
        raise DataError(f"{path}: {state}: the header announces {expected} bytes of data, the file has {found}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).view(shape) if body else torch.empty(shape).byte()


def find_idx(folder: Path, stem: str) -> Path:
    """The file ``stem.gz`` or ``stem`` in ``folder``; DataError when neither is there."""
    for name in (f"{stem}.gz", stem):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: has no {stem}.gz (nor {stem})")


def read_pair(folder: Path, prefix: str, n_classes: int) -> tuple[Tensor, Tensor]:
    """Images (n, rows, columns) uint8 and labels (n,) int64 of ``{prefix}-images-idx3-ubyte`` and its labels.

    Raises :class:`DataError` when the counts disagree, there is no image, or a label lies outside
    ``[0, n_classes)``.
    """
    image_path = find_idx(folder, f"{prefix}-images-idx3-ubyte")
    label_path = find_idx(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{label_path}: {len(labels)} labels for the {len(images)} images of {image_path.name}")
    if images.numel() == 0:
        raise DataError(f"{image_path}: holds no pixels: shape {tuple(images.shape)}")
    if int(labels.max()) >= n_classes:
        raise DataError(f"{label_path}: label {int(labels.max())} lies outside 0..{n_classes - 1}")
    return images, labels.long()
