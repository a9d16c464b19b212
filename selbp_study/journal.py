"""The journal of a run's state: what a killed run goes on from.

It keeps the state after *every* step that it is given, so that a killed run loses only what came after the last one.
Two slots are written in turn, never the one that holds the newest state. A slot's header is cleared, the body written,
then the header, which carries the sequence number and a checksum: at any instant one slot is whole. Writing stops at
the page cache, which survives the process but not the machine, so a third slot is written and fsynced before the first
step and every so many seconds; reading takes the newest slot whose checksum holds. The format is JSON and raw bytes:
loading executes nothing.

A slot is written in place. So it must be a file of its own: a link, symbolic or hard, is refused, for the file at its
other end is not the run's.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selbp_study.storage import FOLLOW_NOTHING, StorageError, read_bytes

Block = np.ndarray[Any, np.dtype[np.uint8]]
MAGIC = b"SELBPJ02"
SUMMED = b"SELBPJ01"  # slots of earlier versions, whose checksum is a sum of words
HEADER = struct.Struct("<8sQQQQ")  # magic, sequence number, bytes of JSON, bytes of tensors, checksum
ALIGN = 64
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


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


def checksum(sequence: int, text: bytes, block: bytes | memoryview) -> int:
    """CRC-32 of the header's numbers, the JSON and the tensors: it sees words exchanged, as a sum does not."""
    numbers = struct.pack("<QQQ", sequence, len(text), len(block))
    return zlib.crc32(block, zlib.crc32(text, zlib.crc32(numbers)))


def sum_of_words(sequence: int, text: bytes, block: bytes) -> int:
    """The checksum of slots that begin with :data:`SUMMED`."""
    words = np.frombuffer(text + bytes(-len(text) % 8), np.uint64), np.frombuffer(block, np.uint64)
    return (sequence + sum(int(part.sum(dtype=np.uint64)) for part in words)) % (1 << 64)


class Journal:
    """The state after each step, in ``folder``. Call :meth:`write` after every step and :meth:`read` to resume."""

    SLOTS = ("state-a.bin", "state-b.bin", "state-durable.bin")

    def __init__(
        self, folder: Path, durable_every: float = 20.0, before_durable: Callable[[], None] = lambda: None
    ) -> None:
        self.paths, self.before_durable = [folder / name for name in self.SLOTS], before_durable
        self.durable_every = durable_every  # seconds between fsynced copies
        self.last_durable = time.monotonic()
        self.files: list[int] = []
        self.block: Block | None = None
        self._turn = 1  # the slot that is written next

    def begin(self, state: Any) -> None:
        """Keep ``state`` durably, before the first step: from now on a folder without any whole slot is damaged."""
        self._open()
        self._write_durably(*self._encoded(state, 0))

    def write(self, state: Any, sequence: int) -> None:
        """Keep ``state`` under ``sequence`` (increasing): a kill from now on loses nothing of it."""
        self._open()
        content = self._encoded(state, sequence)
        self._write_slot(self.files[self._turn], *content)
        self._turn = 1 - self._turn  # not where the write was cut short
        if time.monotonic() - self.last_durable >= self.durable_every:
            self._write_durably(*content)

    def _open(self) -> None:
        if not self.files:
            self.files = [_slot(path) for path in self.paths]

    def _encoded(self, state: Any, sequence: int) -> tuple[bytes, bytes, Block]:
        text, self.block = encode(state, self.block)
        header = HEADER.pack(MAGIC, sequence, len(text), self.block.nbytes, checksum(sequence, text, self.block.data))
        return header, text, self.block

    def _write_durably(self, header: bytes, text: bytes, block: Block) -> None:
        self.before_durable()  # what the state takes as written must be so by then
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
        """The newest whole state and its sequence number; None where there is no slot.

        Raises:
            StorageError: There are slots and none of them is whole, or one is a link.
        """
        whole: list[tuple[int, int, bytes, bytes]] = []
        damage: list[str] = []
        for slot, path in enumerate(self.paths):
            found = _read_slot(path)
            if isinstance(found, tuple):
                whole.append((slot, *found))
            elif found is not None:
                damage.append(f"{path.name} {found}")
        for slot, sequence, text, block in sorted(whole, key=lambda found: -found[1]):
            try:
                state = decode(text, block)
            except Exception as error:  # a forged slot: its checksum holds, its content is none of ours
                damage.append(f"state {sequence} cannot be decoded ({type(error).__name__})")
            else:
                self._turn = 1 if slot == 0 else 0
                return state, sequence
        if damage:
            raise StorageError(f"{self.paths[0].parent}: no saved state can be read: {', '.join(damage)}")
        return None


def _slot(path: Path) -> int:
    """A slot's file, open for writing in place."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | FOLLOW_NOTHING, 0o644)
    except OSError as error:
        why = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise StorageError(f"{path}: {why}") from error
    known = os.fstat(file)
    if not stat.S_ISREG(known.st_mode) or known.st_nlink != 1:
        os.close(file)
        raise StorageError(
            f"{path}: is not a regular file of its own, but a link or a device: it would be written over"
        )
    return file


def _read_slot(path: Path) -> tuple[int, bytes, bytes] | str | None:
    """Sequence number, JSON and tensors; what is wrong with the slot; None where there is none."""
    data = read_bytes(path, follow=False)
    if data is None:
        return None
    if len(data) < HEADER.size:
        return "is empty" if not data else "is truncated"
    magic, sequence, n_text, n_block, expected = HEADER.unpack_from(data)
    if magic not in (MAGIC, SUMMED):
        return "was being written" if not any(data[: HEADER.size]) else "is no state of this program"
    start = -(-(HEADER.size + n_text) // ALIGN) * ALIGN
    text, block = data[HEADER.size : HEADER.size + n_text], data[start : start + n_block]
    if len(text) != n_text or len(block) != n_block or n_block % 8:
        return "is truncated"
    summed = sum_of_words if magic == SUMMED else checksum
    return (sequence, text, block) if summed(sequence, text, block) == expected else "is damaged (checksum)"
