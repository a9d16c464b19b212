"""Files that a kill cannot spoil: whole-file writes, a log that can be cut back, and the journal of a run's state.

The journal keeps the state after *every* step, so that a killed run loses only the step in flight. Two slots are
written in turn. A slot's header is cleared, the body written, then the header, which carries the sequence number and a
checksum: at any instant one slot is whole. Writing stops at the page cache, which survives the process but not the
machine, so a third slot is written and fsynced every so many seconds; reading takes the newest slot whose checksum
holds. The format is JSON and raw bytes: loading executes nothing.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Block = np.ndarray[Any, np.dtype[np.uint8]]
MAGIC = b"SELBPJ01"
HEADER = struct.Struct("<8sQQQQ")  # magic, sequence number, bytes of JSON, bytes of tensors, checksum
ALIGN = 64
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


class StorageError(Exception):
    """A file of a run that cannot be read back; the message names it."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, for bytes."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        file = partial.open("wb")
    except OSError as error:  # name the file that was asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    with file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------ JSON lines


class JsonLines:
    """An append-only log, one JSON object a line; a line that a kill cut short is dropped when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row, as one write."""
        with self.path.open("ab") as file:
            file.write(json.dumps(row, allow_nan=True).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole row."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise StorageError(f"{self.path}: line {len(rows) + 1} is not JSON") from error
        return rows

    def cut(self, step: int) -> None:
        """Drop the rows that were written after ``step``: the resumed run writes them again."""
        kept = [row for row in self.read() if row.get("step", 0) <= step]
        write_text(self.path, "".join(json.dumps(row, allow_nan=True) + "\n" for row in kept))


# ------------------------------------------------------------------------------------------------- nested state


def encode(state: Any, reuse: Block | None = None) -> tuple[bytes, Block]:
    """A nest of dicts, lists, tuples, tensors and JSON scalars as JSON and one block of bytes.

    Tensors keep dtype, shape and, for images, the channels-last layout. Anything else is a TypeError. ``reuse`` is a
    block of an earlier call that may be written over, so that its pages are warm.
    """
    pieces: list[tuple[int, Tensor]] = []
    size = 0

    def walk(value: Any) -> Any:
        nonlocal size
        if isinstance(value, Tensor):
            flat = value.detach().cpu()
            last = flat.ndim == 4 and not flat.is_contiguous() and flat.is_contiguous(memory_format=torch.channels_last)
            shape = list(flat.shape)
            flat = (flat.permute(0, 2, 3, 1) if last else flat.contiguous()).reshape(-1).view(torch.uint8)
            entry = {"T": [str(value.dtype).removeprefix("torch."), shape, size, bool(last)]}
            pieces.append((size, flat))
            size += -(-flat.numel() // ALIGN) * ALIGN
            return entry
        if isinstance(value, Mapping):
            return {"D": [[walk(key), walk(item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"L" if isinstance(value, list) else "U": [walk(item) for item in value]}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(f"state may hold tensors, numbers, strings, dicts and lists, got {type(value).__name__}")

    text = json.dumps(walk(state), allow_nan=True).encode()
    block = reuse if reuse is not None and reuse.nbytes == size else np.zeros(size, np.uint8)
    for offset, flat in pieces:
        block[offset : offset + flat.numel()] = flat.numpy()
    return text, block


def decode(text: bytes, block: bytes) -> Any:
    """The inverse of :func:`encode`."""

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "D":
            return {walk(key): walk(item) for key, item in content}
        if kind in ("L", "U"):
            items = [walk(item) for item in content]
            return items if kind == "L" else tuple(items)
        name, shape, offset, last = content
        dtype = DTYPES[name]
        shape = [shape[0], shape[2], shape[3], shape[1]] if last else shape
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            tensor = torch.empty(shape, dtype=dtype)
        else:
            tensor = torch.frombuffer(bytearray(block[offset : offset + count * dtype.itemsize]), dtype=dtype)
            tensor = tensor.reshape(shape).clone()  # clone: torch's own alignment, as in the run that was stopped
        return tensor.permute(0, 3, 1, 2) if last else tensor

    return walk(json.loads(text))


# ----------------------------------------------------------------------------------------------------- journal


def checksum(sequence: int, text: bytes, block: Block) -> int:
    """``sequence`` and the sum of the 64-bit words, mod 2^64: fast, and enough to tell a torn page from a whole one."""
    padded = np.frombuffer(text + bytes(-len(text) % 8), np.uint64)
    return (sequence + int(padded.sum(dtype=np.uint64)) + int(block.view(np.uint64).sum(dtype=np.uint64))) % (1 << 64)


class Journal:
    """The state after each step, in ``folder``. Call :meth:`write` after every step and :meth:`read` to resume."""

    SLOTS = ("state-a.bin", "state-b.bin", "state-durable.bin")

    def __init__(self, folder: Path, durable_every: float = 20.0) -> None:
        self.paths = [folder / name for name in self.SLOTS]
        self.durable_every = durable_every  # seconds between fsynced copies
        self.last_durable = time.monotonic()
        self.files: list[int] = []
        self.block: Block | None = None

    def write(self, state: Any, sequence: int) -> None:
        """Keep ``state`` under ``sequence`` (increasing): a kill from now on loses nothing of it."""
        if not self.files:
            self.files = [os.open(path, os.O_RDWR | os.O_CREAT, 0o644) for path in self.paths]
        text, self.block = encode(state, self.block)
        block = self.block
        header = HEADER.pack(MAGIC, sequence, len(text), block.nbytes, checksum(sequence, text, block))
        self._write_slot(self.files[sequence % 2], header, text, block)
        if time.monotonic() - self.last_durable >= self.durable_every:
            self._write_slot(self.files[2], header, text, block)
            os.fsync(self.files[2])
            self.last_durable = time.monotonic()

    @staticmethod
    def _write_slot(file: int, header: bytes, text: bytes, block: Block) -> None:
        os.pwrite(file, bytes(HEADER.size), 0)
        body = memoryview(text + bytes(-(HEADER.size + len(text)) % ALIGN)), memoryview(block.data)
        offset = HEADER.size
        for part in body:
            while len(part):  # a regular file takes it at once; a full disk raises
                written = os.pwrite(file, part, offset)
                part, offset = part[written:], offset + written
        os.pwrite(file, header, 0)

    def close(self) -> None:
        """Close the slots' files."""
        for file in self.files:
            os.close(file)
        self.files = []

    def remove(self) -> None:
        """Delete the slots: the run is finished."""
        self.close()
        for path in self.paths:
            path.unlink(missing_ok=True)

    def read(self) -> tuple[Any, int] | None:
        """The newest whole state and its sequence number; None where there is none."""
        found = [slot for slot in map(self._read_slot, self.paths) if slot is not None]
        if not found:
            return None
        sequence, text, block = max(found, key=lambda slot: slot[0])
        return decode(text, block), sequence

    @staticmethod
    def _read_slot(path: Path) -> tuple[int, bytes, bytes] | None:
        if not path.exists():
            return None
        data = path.read_bytes()
        if len(data) < HEADER.size:
            return None
        magic, sequence, n_text, n_block, expected = HEADER.unpack_from(data)
        start = -(-(HEADER.size + n_text) // ALIGN) * ALIGN
        text, block = data[HEADER.size : HEADER.size + n_text], data[start : start + n_block]
        if magic != MAGIC or len(text) != n_text or len(block) != n_block:
            return None
        return (sequence, text, block) if checksum(sequence, text, np.frombuffer(block, np.uint8)) == expected else None
