"""The study's data sets, in memory, with the test part kept apart from everything that learns or tunes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from selbp_study.data.debian import fetch_package
from selbp_study.data.idx import DataError, read_pair
from selbp_study.data.kjv import NAME as BIBLE_FILE
from selbp_study.data.kjv import read_chapters

if TYPE_CHECKING:
    from typing_extensions import Self

FASHION_MNIST = "fashion-mnist"
BIBLE = "bible-kjv"
DIGITS = "digits"
SYSTEM_ROOT = Path("/")
N_CLASSES = 10
HELD_OUT = "-held-out"  # ends the name of a data set whose test part is cut from the training part
WINDOW = 32  # characters of a text's sample
TEST_CHAPTERS = slice(10, None, 20)  # of the Bible's 1189: every twentieth, so that every kind of book is in both parts


@dataclass(frozen=True)
class Split:
    """Labelled images, kept as bytes; :meth:`batch` hands out normalised floats."""

    inputs: Tensor  # (n, rows, columns) uint8
    labels: Tensor  # (n,) int64
    mean: float  # of the training pixels
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(k, 1, rows, columns) float32 of mean 0 and variance 1 (over the training part), and (k,) labels."""
        pixels = self.inputs.index_select(0, indices).unsqueeze(1).float()
        return pixels.sub_(self.mean).div_(self.std), self.labels.index_select(0, indices)

    def take(self, indices: Tensor) -> Self:
        """The split of these samples alone."""
        return replace(self, inputs=self.inputs[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> Self:
        """The split on ``device``."""
        return replace(self, inputs=self.inputs.to(device), labels=self.labels.to(device))


@dataclass(frozen=True)
class Text(Split):
    """Windows of a text as codes of its alphabet, inputs (n, T) uint8; labels (n, T) are the codes one place on."""

    mean: float = 0.0
    std: float = 1.0

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(k, T) int64 codes, and the (k, T) codes that follow each of them."""
        return self.inputs.index_select(0, indices).long(), self.labels.index_select(0, indices)


NOISE_STREAM = 0x6E6F6973  # added to the seed of label noise; torch's CPU generator reads a seed's low 32 bits only


@dataclass(frozen=True)
class Dataset:
    """A training part and a part that only evaluates."""

    name: str
    train: Split
    test: Split
    n_classes: int
    source: str  # where it came from, for the record

    @property
    def fingerprint(self) -> str:
        """A short digest of every input and label of both parts: results are cached under it."""
        digest = hashlib.sha256()
        for split in (self.train, self.test):
            digest.update(split.inputs.contiguous().numpy().tobytes())
            digest.update(split.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def with_label_noise(self, share: float, seed: int = 0) -> Dataset:
        """The data set with ``share`` of its *training* labels turned into another class, each as likely."""
        check_share("share", share)
        # Not the stream that held_out permutes by: it would hold out the samples with wrong labels, and no other.
        generator = torch.Generator().manual_seed(seed + NOISE_STREAM)
        wrong = torch.randperm(len(self.train), generator=generator)[: round(share * len(self.train))]
        labels = self.train.labels.clone()
        labels[wrong] += torch.randint(1, self.n_classes, labels[wrong].shape, generator=generator)
        labels.remainder_(self.n_classes)
        source = f"{self.source}, {share:.0%} of the training labels turned into another class (seed {seed})"
        return replace(
            self, name=f"{self.name}+noise={share:g}", train=replace(self.train, labels=labels), source=source
        )

    def held_out(self, fraction: float = 0.1, seed: int = 0) -> Dataset:
        """A data set for tuning: its test part is cut from *this training part*; the real test part is not in it."""
        check_share("fraction", fraction)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        cut = max(1, round(fraction * len(order)))
        source = f"{self.source}, {cut} of its training samples held out (seed {seed})"
        return Dataset(
            self.name + HELD_OUT, self.train.take(order[cut:]), self.train.take(order[:cut]), self.n_classes, source
        )


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number in (0, 1)."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be a number in (0, 1), got {value!r}")


def make_dataset(
    name: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], n_classes: int, source: str
) -> Dataset:
    """Normalise by the training part's own mean and deviation; images uint8 (n, rows, columns), labels int64."""
    pixels = train[0].double()
    mean, std = float(pixels.mean()), float(pixels.std()) or 1.0
    return Dataset(name, Split(*train, mean, std), Split(*test, mean, std), n_classes, source)


def cache_folder() -> Path:
    """Where fetched data sets live: ``$SELBP_CACHE``, else ``$XDG_CACHE_HOME/selbp``, else ``~/.cache/selbp``."""
    if "SELBP_CACHE" in os.environ:
        return Path(os.environ["SELBP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selbp"


def read_fashion_mnist(folder: Path) -> Dataset:
    """Read the four IDX files of ``folder``; DataError names the file that is missing, corrupt or inconsistent."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    train, test = read_pair(folder, "train", N_CLASSES), read_pair(folder, "t10k", N_CLASSES)
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{folder}: training images are {tuple(train[0].shape[1:])}, test ones {tuple(test[0].shape[1:])}"
        )
    return make_dataset(FASHION_MNIST, train, test, N_CLASSES, str(folder))


def read_bible(folder: Path) -> Dataset:
    """Read ``bible.data`` as next-character prediction: a sample is a window of the text, its labels one place on."""
    chapters = read_chapters(folder)
    alphabet = sorted(set().union(*chapters, "\n"))
    code = {ord(character): number for number, character in enumerate(alphabet)}
    test = chapters[TEST_CHAPTERS]
    del chapters[TEST_CHAPTERS]
    parts = []
    for part in (chapters, test):
        text = bytearray("\n".join(part).translate(code).encode("latin-1"))
        n = (len(text) - 1) // WINDOW
        if n < 1:
            raise DataError(f"{folder}: its text is too short for a training and a test part")
        codes = torch.frombuffer(text, dtype=torch.uint8)
        inputs, labels = codes[: n * WINDOW], codes[1 : n * WINDOW + 1]
        parts.append(Text(inputs.view(n, WINDOW), labels.long().view(n, WINDOW)))
    return Dataset(BIBLE, parts[0], parts[1], len(alphabet), f"{folder}, every twentieth chapter to test")


@dataclass(frozen=True)
class Source:
    """A data set that Debian packages."""

    title: str
    package: str
    megabytes: int
    folder: str  # inside the package, and below the root where it is installed
    file: str  # one of its files
    read: Callable[[Path], Dataset]


SOURCES = {
    FASHION_MNIST: Source(
        "Fashion-MNIST",
        "dataset-fashion-mnist",
        31,
        "usr/share/datasets/fashion-mnist",
        "train-images-idx3-ubyte.gz",
        read_fashion_mnist,
    ),
    BIBLE: Source("the King James Bible", "bible-kjv-text", 2, "usr/lib", BIBLE_FILE, read_bible),
}
NAMES = (*SOURCES, DIGITS)


def load_digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels; every fifth one (after a fixed shuffle) is test."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from error
    bunch = sklearn_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[order]
    labels = torch.from_numpy(bunch.target).long()[order]
    cut = len(order) // 5
    return make_dataset(
        DIGITS, (images[cut:], labels[cut:]), (images[:cut], labels[:cut]), N_CLASSES, "scikit-learn's load_digits"
    )


def load(
    name: str,
    folder: Path | None = None,
    *,
    fallback: bool = False,
    say: Callable[[str], None] = print,
    fetch: Callable[..., Path] = fetch_package,
) -> Dataset:
    """Load a data set by name: from ``folder``, else the system's copy, else the cache's, else fetched into the cache.

    With ``fallback``, the digits stand in, and it is said, when a set cannot be had at all; a folder that was named, or
    files that are there and corrupt, are an error in any case.
    """
    if name == DIGITS:
        if folder is not None:
            raise DataError(f"the digits come with scikit-learn and are read from no folder, got {folder}")
        return load_digits()
    if name not in SOURCES:
        raise DataError(f"there is no data set {name!r}; there are {', '.join(NAMES)}")
    source, cached = SOURCES[name], cache_folder() / name
    system = SYSTEM_ROOT / source.folder
    places = [folder] if folder is not None else [p for p in (system, cached) if (p / source.file).exists()]
    try:
        if not places and not cached.is_dir():
            fetch(source.package, source.folder, cached, megabytes=source.megabytes, say=say)
        return source.read(places[0] if places else cached)
    except DataError as error:
        if places or cached.is_dir() or not fallback:
            raise DataError(f"{error}. Name a folder with the files of {source.title} (--data)") from error
        say(f"{source.title} cannot be had here ({error}).")
        say("Going on with scikit-learn's 1797 digits instead: a far smaller and easier set; its table says so.")
        return load_digits()
