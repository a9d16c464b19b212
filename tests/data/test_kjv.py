"""The Bible's file and the text set made of it: written here in its layout, whole and broken."""

from __future__ import annotations

import itertools
import shutil
import struct
from pathlib import Path

import pytest
import torch

from selbp_study.data import DataError, Text, load, resolve
from selbp_study.data.datasets import WINDOW
from selbp_study.data.kjv import HEADER, MAGIC, NAME, read_chapters

pytestmark = pytest.mark.skipif(shutil.which("gzip") is None, reason="needs gzip")


def write_file(path: Path, text: bytes, size: int = 4096) -> None:
    """Write ``text`` in this layout, every byte a code of its own."""
    windows = [_literal(text[start : start + size]) for start in range(0, len(text), size)]
    first = HEADER + 12 + 4 * len(windows)
    starts = list(itertools.accumulate(map(len, windows), initial=first))[:-1]
    head = MAGIC.ljust(HEADER, b"\0") + struct.pack(f">{3 + len(starts)}I", 0, size, len(starts), *starts)
    path.write_bytes(head + b"".join(windows))


def _literal(text: bytes) -> bytes:
    """The codes of ``text``, nine bits each, least significant first; code 256 empties the table before it widens."""
    out, groups = bytearray(), range(0, len(text), 200)
    for start in groups:
        codes = [*text[start : start + 200], *([256] if start + 200 < len(text) else [])]
        bits = sum(code << (9 * place) for place, code in enumerate(codes))
        # A change of the table starts at a multiple of eight codes: what is between is skipped by the reader.
        length = -(-len(codes) // 8) * 9 if 256 in codes else -(-9 * len(codes) // 8)
        out += bits.to_bytes(length, "little")
    return bytes(out)


def book(chapters: int = 40) -> list[list[str]]:
    """Chapters of verses that differ."""
    return [
        [f"And in the year {c} of verse {v}, he said: {'selah ' * (v % 5)}so be it." for v in range(9)]
        for c in range(chapters)
    ]


def write_book(folder: Path, chapters: list[list[str]]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [
        f"{'Ge' if c < 20 else '1Sam'}{c + 1}:{v + 1} {verse}"
        for c, verses in enumerate(chapters)
        for v, verse in enumerate(verses)
    ]
    write_file(folder / NAME, "\n".join(["A title.", *lines, ""]).encode())
    return folder


def test_chapters_without_their_numbers(tmp_path: Path) -> None:
    assert read_chapters(write_book(tmp_path, book())) == ["\n".join(verses) for verses in book()]


def broken(content: bytes, damage: str) -> bytes:
    if damage == "another format":
        return b"PK" + content
    if damage == "truncated":
        return content[: len(content) // 2]
    if damage == "no windows":
        return content[: HEADER + 8] + struct.pack(">I", 0) + content[HEADER + 12 :]
    if damage == "window size":
        return content[: HEADER + 4] + struct.pack(">I", 4095) + content[HEADER + 8 :]
    start = struct.unpack_from(">I", content, HEADER + 12)[0]
    return content[:start] + b"\xff" * 40 + content[start + 40 :]  # codes that no table has


@pytest.mark.parametrize("damage", ["another format", "truncated", "no windows", "window size", "corrupt"])
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = write_book(tmp_path, book()) / NAME
    path.write_bytes(broken(path.read_bytes(), damage))
    with pytest.raises(DataError, match=NAME):
        load("bible-kjv", tmp_path, fallback=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=NAME):
        read_chapters(tmp_path)
    write_file(tmp_path / NAME, b"no verses\nat all\n" * 20)
    with pytest.raises(DataError, match="no verses"):
        read_chapters(tmp_path)
    with pytest.raises(DataError, match="too short"):
        load("bible-kjv", write_book(tmp_path, book(3)))


def decoded(rows: torch.Tensor, alphabet: str) -> str:
    return "".join(alphabet[code] for code in rows.flatten().tolist())


def test_windows_of_the_text_and_what_comes_next(tmp_path: Path) -> None:
    data = load("bible-kjv", write_book(tmp_path, book()))
    alphabet = "".join(sorted({*"".join(map("".join, book())), "\n"}))
    assert data.n_classes == len(alphabet) and isinstance(data.train, Text)
    inputs, labels = data.train.batch(torch.arange(len(data.train)))
    assert inputs.shape == labels.shape == (len(data.train), WINDOW)
    assert inputs.dtype == labels.dtype == torch.int64
    chapters = ["\n".join(verses) for verses in book()]
    learned = "\n".join(chapter for number, chapter in enumerate(chapters) if number % 20 != 10)
    assert learned.startswith(decoded(inputs, alphabet)) and learned[1:].startswith(decoded(labels, alphabet))
    assert torch.equal(inputs[:, 1:], labels[:, :-1]) and torch.equal(inputs[1:, 0], labels[:-1, -1])
    tested = "\n".join(chapters[10::20])
    assert tested.startswith(decoded(data.test.inputs, alphabet)) and len(tested) - data.test.labels.numel() <= WINDOW


def test_parts_and_noise_are_those_of_any_set(tmp_path: Path) -> None:
    folder = write_book(tmp_path, book())
    data = resolve("bible-kjv", folder)
    held_out = resolve("bible-kjv-held-out", folder)
    assert isinstance(held_out.test, Text) and held_out.fingerprint == data.held_out().fingerprint
    assert len(held_out.test) + len(held_out.train) == len(data.train)
    noisy = resolve("bible-kjv+noise=0.25", folder)
    changed = noisy.train.labels != data.train.labels
    wrong = round(0.25 * len(data.train))
    assert int(changed.all(1).sum()) == wrong and int(changed.any(1).sum()) == wrong
    assert torch.equal(noisy.test.labels, data.test.labels) and int(noisy.train.labels.max()) < data.n_classes
