"""Files that a kill cannot spoil: whole-file writes, reads that believe nothing, a log that can be cut back, a lock.

Every file is read through :func:`read_bytes`: what is no regular file, or cannot be read, is a :class:`StorageError`
that names it. What is written goes to a temporary file, is fsynced and takes the old one's place. The journal of a
run's state is :mod:`selbp_study.journal`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

FOLLOW_NOTHING = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # not blocking: a pipe has no end to wait for


class StorageError(Exception):
    """A file of a run that cannot be read back or written; the message names it."""


class LockedError(StorageError):
    """Another process writes to the folder."""


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, data: bytes) -> None:
    """As :func:`write_text`, for bytes."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.unlink(missing_ok=True)  # of an earlier process of this number
        file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FOLLOW_NOTHING, 0o666)
    except OSError as error:  # name the file that was asked for
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(file, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_bytes(path: Path, *, follow: bool = True) -> bytes | None:
    """What ``path`` holds; None where there is nothing. StorageError for anything else than a readable regular file.

    Without ``follow``, a symbolic link is refused.
    """
    flags = os.O_RDONLY | (FOLLOW_NOTHING & ~os.O_NOFOLLOW if follow else FOLLOW_NOTHING)
    try:
        file = os.open(path, flags)
    except FileNotFoundError:
        if path.is_symlink():
            raise StorageError(f"{path}: is a symbolic link to nothing") from None
        return None
    except OSError as error:
        why = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise StorageError(f"{path}: {why}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise StorageError(f"{path}: is not a regular file")
    with os.fdopen(file, "rb") as stream:
        try:
            return stream.read()
        except (OSError, MemoryError) as error:
            raise StorageError(f"{path}: {getattr(error, 'strerror', None) or 'is too large to read'}") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; None where there is no file. StorageError where it holds anything else."""
    data = read_bytes(path)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except RecursionError:
        raise StorageError(f"{path}: is not JSON: it is nested too deeply") from None
    except UnicodeDecodeError:
        raise StorageError(f"{path}: is not JSON: it is not UTF-8") from None
    except ValueError as error:
        raise StorageError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: must hold a JSON object, got a {type(value).__name__}")
    return value


def checked(path: Path, value: dict[str, Any], check: Callable[[dict[str, Any]], str | None]) -> dict[str, Any]:
    """``value`` of ``path``, if ``check`` finds nothing wrong with it; else StorageError with what it says."""
    wrong = check(value)
    if wrong is not None:
        raise StorageError(f"{path}: {wrong}")
    return value


# ------------------------------------------------------------------------------------------------------------- lock


class Lock:
    """That no second process writes to ``folder``: an advisory lock (flock) on a file in it, released by any end.

    The file goes when the lock does; one that a kill has left holds nobody up. Where the file system knows no locks,
    there is none.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self.path, self.file = folder / self.NAME, -1

    def acquire(self, wait: bool = False) -> Lock:
        """Take it; LockedError where another process has it, unless ``wait``. The folder must exist.

        Who has it already keeps it.
        """
        while self.file < 0:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT | FOLLOW_NOTHING, 0o666)
            except OSError as error:
                raise StorageError(f"{self.path}: cannot be opened to lock its folder: {error.strerror}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                os.close(file)
                raise LockedError(
                    f"{self.path.parent}: another process is writing to this folder: wait for it, or name another"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    os.close(file)
                    raise
            if self._still_there(file):
                self.file = file
            else:  # whoever had it has removed the file meanwhile
                os.close(file)
        return self

    def _still_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.lstat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give it back; a second call does nothing."""
        if self.file >= 0:
            self.path.unlink(missing_ok=True)  # while it is ours: nobody else can have locked this very file
            os.close(self.file)
            self.file = -1

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


# ------------------------------------------------------------------------------------------------------- JSON lines


class JsonLines:
    """An append-only log, one JSON object a line; a line that a kill cut short is dropped when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row, as one write."""
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | FOLLOW_NOTHING, 0o666)
        except OSError as error:
            why = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
            raise StorageError(f"{self.path}: {why}") from error
        with os.fdopen(file, "ab") as stream:
            stream.write(json.dumps(row, allow_nan=True).encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Every whole row. StorageError names the line that is none."""
        data = read_bytes(self.path, follow=False)
        rows: list[dict[str, Any]] = []
        for line in (data or b"").split(b"\n")[:-1]:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise StorageError(f"{self.path}: line {len(rows) + 1} is not JSON") from error
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise StorageError(f"{self.path}: line {len(rows) + 1} is no row of a log: it has no step")
            rows.append(row)
        return rows

    def sync(self) -> None:
        """Have what was appended survive the machine too."""
        if self.path.exists():
            file = os.open(self.path, os.O_RDONLY | FOLLOW_NOTHING)
            try:
                os.fsync(file)
            finally:
                os.close(file)

    def cut(self, step: int) -> None:
        """Drop the rows that were written after ``step``: the resumed run writes them again."""
        kept = [row for row in self.read() if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row, allow_nan=True) + "\n" for row in kept))
