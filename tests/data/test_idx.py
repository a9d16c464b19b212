"""IDX parsing: files made on the fly, whole and broken in every way that the parser promises to notice."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from support.images import write_idx

from selbp_study.data.idx import DataError, read_idx, read_pair


def idx_bytes(tensor: torch.Tensor, *, kind: int = 0x08, shape: tuple[int, ...] | None = None) -> bytes:
    shape = tuple(tensor.shape) if shape is None else shape
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + tensor.to(torch.uint8).numpy().tobytes()


def write_pair(folder: Path, prefix: str, images: torch.Tensor, labels: torch.Tensor, zipped: bool = True) -> None:
    suffix = ".gz" if zipped else ""
    write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images.to(torch.uint8))
    write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels.to(torch.uint8))


IMAGES = torch.arange(3 * 4 * 5).view(3, 4, 5)
LABELS = torch.tensor([0, 9, 4])


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_was_written(tmp_path: Path, zipped: bool) -> None:
    write_pair(tmp_path, "train", IMAGES, LABELS, zipped)
    images, labels = read_pair(tmp_path, "train", 10)
    assert images.dtype == torch.uint8 and labels.dtype == torch.int64
    assert torch.equal(images, IMAGES.to(torch.uint8)) and torch.equal(labels, LABELS)


BROKEN = {
    "empty": (b"", "truncated"),
    "header": (idx_bytes(IMAGES)[:9], "truncated"),
    "body": (idx_bytes(IMAGES)[:-1], "truncated"),
    "long": (idx_bytes(IMAGES) + b"\0", "too long"),
    "magic": (b"\x01" + idx_bytes(IMAGES)[1:], "not an IDX file"),
    "type": (idx_bytes(IMAGES, kind=0x0D), "not an IDX file"),
    "rank": (idx_bytes(LABELS) + bytes(20), "not an IDX file"),
    "bomb": (idx_bytes(IMAGES, shape=(1 << 20, 1 << 10, 1 << 10)), "not believable"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("zipped", [True, False])
def test_broken_content_names_the_file(tmp_path: Path, case: str, zipped: bool) -> None:
    data, reason = BROKEN[case]
    path = tmp_path / ("images.gz" if zipped else "images")
    path.write_bytes(gzip.compress(data) if zipped else data)
    with pytest.raises(DataError, match=reason) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip", "checksum"])
def test_damaged_gzip_names_the_file(tmp_path: Path, damage: str) -> None:
    data = bytearray(gzip.compress(idx_bytes(torch.randint(0, 255, (20, 8, 8)))))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    elif damage == "not gzip":
        data[0] = 0
    else:
        data[-5] ^= 0xFF
    path = tmp_path / "images.gz"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_idx(path, 3)
    assert str(path) in str(caught.value)


def test_counts_labels_and_presence_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        read_pair(tmp_path, "train", 10)
    write_pair(tmp_path, "train", IMAGES, LABELS[:2])
    with pytest.raises(DataError, match="2 labels for the 3 images"):
        read_pair(tmp_path, "train", 10)
    write_pair(tmp_path, "train", IMAGES, torch.tensor([0, 10, 4]))
    with pytest.raises(DataError, match="label 10 lies outside 0..9"):
        read_pair(tmp_path, "train", 10)
    write_pair(tmp_path, "train", IMAGES[:0], LABELS[:0])
    with pytest.raises(DataError, match="no pixels"):
        read_pair(tmp_path, "train", 10)


def test_a_folder_in_place_of_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_idx(tmp_path / "images", 3)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_the_writer_agrees_with_the_format(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path / name, IMAGES.to(torch.uint8))
    data = (tmp_path / name).read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data) == idx_bytes(IMAGES)
