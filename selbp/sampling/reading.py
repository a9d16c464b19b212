"""A data set as a proxy reads it: once, a chunk of samples at a time, in this process or by workers."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from selbp._numpy import ARRAYS
from selbp.sampling.features import RAGGED, Features, automatic, checked, joined, samples_of, shape_of

FIRST, MOST = 8, 1024  # samples of the first chunk, and of any
BYTES = 64 << 20  # of a chunk's inputs, as the data set gives them
NUMBER = 32  # bytes of one in a list
PATIENCE = 3.0  # seconds of reading before a bar shows how far it is


class Chunk(NamedTuple):
    """Samples that were read one after another."""

    made: Any  # their features, for "auto"; their inputs, for a function; None, for a matrix
    labels: Tensor  # (m,) int64
    shape: tuple[int, ...] | None  # see :func:`selbp.sampling.features.shape_of`
    size: int  # bytes of their inputs


class Chunks:
    """The chunks of a data set by their samples' numbers, each a range. A worker may have a copy."""

    def __init__(self, dataset: Any, features: Features, alike: bool) -> None:
        self._dataset, self._alike = dataset, alike
        # A function may need what only this process has, such as a GPU: a worker reads its inputs, and no more.
        self._make = features if isinstance(features, str) else "nothing" if isinstance(features, Tensor) else "inputs"

    def __getitem__(self, ids: range) -> Chunk:
        inputs, labels = samples_of(self._dataset, ids, auto=self._make == "auto")
        shape, size = shape_of(inputs) if self._make == "auto" else None, _bytes(inputs)
        made = None if self._make == "nothing" else inputs
        if self._make == "auto":
            made = checked(automatic(inputs, self._alike), ids)
        elif get_worker_info() is not None and not isinstance(made, Tensor):
            made = pickle.dumps(made)  # one piece: each tensor on its own would take a file descriptor
        return Chunk(made, labels.cpu(), shape, size)


class Ranges:
    """The numbers of ``n`` samples in ranges: few at first, and as many as fit in :data:`BYTES` once they are known."""

    def __init__(self, n: int) -> None:
        self._n, self._rows = n, FIRST

    def __iter__(self) -> Iterator[range]:
        first = 0
        while first < self._n:
            ids = range(first, min(first + self._rows, self._n))
            first = ids.stop
            yield ids

    def note(self, chunk: Chunk) -> None:
        """Take in what the samples of ``chunk`` take."""
        each = max(1, chunk.size // len(chunk.labels))
        self._rows = max(1, min(2 * self._rows, MOST, BYTES // each))


def read(dataset: Any, features: Features, n: int, workers: int) -> tuple[Tensor, Tensor]:
    """(n, d) features and (n,) labels. They do not depend on the chunks, nor on ``workers``."""
    found = _in_one_shape(dataset, features, n, workers, alike=True)
    if found is None:  # features of another kind: they are the same for images of every size
        found = _in_one_shape(dataset, features, n, workers, alike=False)
    assert found is not None
    parts, labels = found
    return joined(parts), torch.cat(labels)


def _in_one_shape(
    dataset: Any, features: Features, n: int, workers: int, *, alike: bool
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Features and labels of each chunk; None as soon as inputs that were taken to be ``alike`` are not."""
    parts, labels, first, shape = list[Tensor](), list[Tensor](), 0, None
    for chunk in _with_a_bar(_chunks(Chunks(dataset, features, alike), n, workers), n):
        shape = chunk.shape if shape is None else shape
        if alike and chunk.shape is not None and (chunk.shape != shape or shape == RAGGED):
            return None
        ids = range(first, first + len(chunk.labels))
        first = ids.stop
        parts.append(_features_of(chunk.made, features, ids))
        labels.append(chunk.labels)
    return parts, labels


def _features_of(made: Any, features: Features, ids: range) -> Tensor:
    """(m, d) float32 of the samples ``ids``."""
    if isinstance(features, Tensor):
        return features[ids.start : ids.stop].float().cpu()
    if isinstance(features, str):
        return made
    return checked(features(pickle.loads(made) if isinstance(made, bytes) else made), ids)


def _chunks(chunks: Chunks, n: int, workers: int) -> Iterator[Chunk]:
    """All chunks of ``n`` samples, in order."""
    ranges = Ranges(n)
    made: Iterable[Chunk] = map(chunks.__getitem__, ranges)
    if workers:
        loader: DataLoader[Chunk] = DataLoader(
            chunks,  # type: ignore[arg-type]
            batch_size=None,
            sampler=ranges,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the loader would draw from torch's own
        )
        with torch.device("cpu"):  # else it would draw on the default device, and a fork would make tensors there
            made = iter(loader)
    for chunk in made:
        ranges.note(chunk)
        yield chunk


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _with_a_bar(chunks: Iterator[Chunk], n: int) -> Iterator[Chunk]:
    """``chunks``; where they take long, stderr is a terminal and tqdm is installed, with a bar there."""
    begun, done, bar, wanted = time.monotonic(), 0, None, True
    try:
        for chunk in chunks:
            yield chunk
            done += len(chunk.labels)
            if wanted and time.monotonic() - begun >= PATIENCE:
                wanted, bar = False, _bar(n, done)
            elif bar is not None:
                bar.update(len(chunk.labels))
    finally:
        if bar is not None:
            bar.close()


def _bar(n: int, done: int) -> Any:
    """A bar of tqdm's, which is not there where stderr is no terminal; None without tqdm."""
    try:
        from tqdm import tqdm  # only now: importing it takes as long as reading some data sets
    except ImportError:
        return None
    return tqdm(desc="reading the data set", total=n, initial=done, unit=" samples", leave=False, disable=None)


def _bytes(inputs: Any) -> int:
    """About what inputs take in memory."""
    if isinstance(inputs, Tensor) or isinstance(inputs, ARRAYS):
        return int(inputs.nbytes)
    if isinstance(inputs, Mapping):
        return sum(map(_bytes, inputs.values()))
    if isinstance(inputs, (str, bytes)):
        return len(inputs)
    if isinstance(inputs, (list, tuple)):
        numbers = not len(inputs) or isinstance(inputs[0], (int, float))
        return NUMBER * len(inputs) if numbers else sum(map(_bytes, inputs))
    if hasattr(inputs, "getbands"):
        width, height = inputs.size
        return width * height * len(inputs.getbands())
    return NUMBER
