"""The King James Bible as Debian's ``bible-kjv-text`` stores it: one file, ``bible.data``, of compressed windows.

Layout, big-endian after 80 bytes that name the format: 0, the size of a window, the number of windows, and where each
of them starts. A window is the body of a ``.Z`` file (the ``compress`` of old Unix: 16 bits, block mode) without its
three bytes of header, which is what gzip still reads. The text has a verse a line: ``Ge1:1 In the beginning ...``.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
from pathlib import Path

from selbp_study.data.idx import DataError

NAME = "bible.data"
MAGIC, HEADER = b"EC02Compressed Data File", 80
COMPRESSED = b"\x1f\x9d\x90"  # the header of a .Z file: magic, then block mode and 16 bits
MOST_WINDOWS = 1 << 12
VERSE = re.compile(r"([1-3]?[A-Z][A-Za-z]*[0-9]+):[0-9]+ (.+)")


def read_chapters(folder: Path) -> list[str]:
    """The chapters in order, a verse a line, without chapter and verse numbers.

    Raises :class:`DataError`, which names the file, when it is missing, of another format, truncated or corrupt.
    """
    path = folder / NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    lines = _text(path, content).splitlines()
    verses = [match.groups() for match in map(VERSE.fullmatch, lines) if match]
    if len(verses) < max(1, len(lines) - 2):  # one line is a title, and one the remains of an index before it
        raise DataError(f"{path}: {len(lines) - len(verses)} of {len(lines)} lines are no verses")
    groups = itertools.groupby(verses, key=lambda verse: verse[0])
    return ["\n".join(text for _, text in chapter) for _, chapter in groups]


def _text(path: Path, content: bytes) -> str:
    if not content.startswith(MAGIC) or len(content) < HEADER + 12:
        raise DataError(f"{path}: does not begin as Debian's bible.data does")
    _, size, count = struct.unpack_from(">3I", content, HEADER)
    if not 1 <= count <= MOST_WINDOWS or len(content) < HEADER + 12 + 4 * count:
        raise DataError(f"{path}: its header asks for {count} windows")
    bounds = [*struct.unpack_from(f">{count}I", content, HEADER + 12), len(content)]
    if any(first >= last for first, last in itertools.pairwise(bounds)):
        raise DataError(f"{path}: its {count} windows do not lie in the file one after the other: is it truncated?")
    windows = [_window(path, content[first:last]) for first, last in itertools.pairwise(bounds)]
    if any(len(window) != size for window in windows[:-1]) or len(windows[-1]) > size:
        raise DataError(f"{path}: a window does not hold the {size} bytes that the header says")
    return b"".join(windows).decode("ascii", "replace")


def _window(path: Path, body: bytes) -> bytes:
    try:
        done = subprocess.run(["gzip", "-dc"], input=COMPRESSED + body, capture_output=True)
    except FileNotFoundError as error:
        raise DataError(f"{path}: is read with gzip, which is not on this machine") from error
    if done.returncode != 0:
        raise DataError(f"{path}: {done.stderr.decode(errors='replace').strip() or 'gzip failed'}")
    return done.stdout
