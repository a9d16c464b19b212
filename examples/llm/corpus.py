"""Text that a Debian machine with Python has: its packages' documentation, and the docstrings of Python's library."""

from __future__ import annotations

import ast
import gettext
import gzip
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

DOCUMENTS = Path("/usr/share/doc"), Path("/usr/share/common-licenses")
CATALOGUES = Path("/usr/share/locale"), Path("/usr/share/vim")  # of translations, in other languages
PAD, END = "<pad>", "<end>"
HELD_OUT = 10  # every tenth file is for evaluation alone
KINDS = ("clean", "shuffled", "other language", "repeated")


def documents(limit: int) -> list[str]:
    """Paragraphs of the packages' documentation, each once, up to ``limit`` characters. Raises FileNotFoundError."""
    found: dict[str, None] = {}
    for text in _files(limit):
        found.update(dict.fromkeys(part.strip() for part in text.split("\n\n") if len(part) > 60))
    if not found:
        raise FileNotFoundError(f"no text in {' or '.join(map(str, DOCUMENTS))}: the recipe is for a Debian machine")
    return list(found)


def _files(limit: int) -> Iterator[str]:
    for path in sorted(path for folder in DOCUMENTS for path in folder.rglob("*") if path.is_file()):
        if limit <= 0:
            return
        if path.suffix not in ("", ".gz", ".txt", ".md") or path.stat().st_size > 1 << 20:
            continue
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        except (OSError, UnicodeDecodeError):
            continue
        limit -= len(text)
        yield text


def docstrings(files: int) -> tuple[list[str], list[str]]:
    """Docstrings of Python's library, for training and, of other files, for evaluation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    parts: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for place, path in enumerate(paths[:files]):
        try:
            nodes = list(ast.walk(ast.parse(path.read_text())))
        except (OSError, SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        parts[place % HELD_OUT == 0].update(dict.fromkeys(text for text in texts if text and len(text) > 60))
    train, held_out = parts
    return list(train), [text for text in held_out if text not in train]


def other_languages(count: int) -> list[str]:
    """Messages in other languages from installed catalogues; of none, lines of Python code."""
    found: dict[str, None] = {}
    for path in sorted(path for folder in CATALOGUES for path in folder.rglob("*.mo")):
        if len(found) >= 4 * count:
            break
        try:
            with path.open("rb") as file:
                messages = gettext.GNUTranslations(file)._catalog.values()  # type: ignore[attr-defined]
        except (OSError, UnicodeDecodeError, ValueError):
            continue
        found.update(dict.fromkeys(text for text in messages if len(text) > 60))
    if not found:
        lines = Path(ast.__file__).read_text().splitlines()
        found = dict.fromkeys("\n".join(lines[at : at + 8]) for at in range(0, len(lines) - 8, 4))
    return list(found)


def trained_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level pairs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Samples:
    """(n, T) token ids, labels that are -100 where a sample has ended, and (n,) the kind of each in ``KINDS``."""

    ids: Tensor
    labels: Tensor
    kinds: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """What a model of Transformers takes."""
        labels = self.labels[rows]
        return {"input_ids": self.ids[rows], "attention_mask": (labels != -100).long(), "labels": labels}


def encoded(tokenizer: Tokenizer, texts: list[str], length: int, kinds: list[int] | None = None) -> Samples:
    """The first ``length`` tokens of each text."""
    end = tokenizer.token_to_id(END)
    rows = [[*found.ids, end][:length] for found in tokenizer.encode_batch(texts)]
    return _padded(rows, length, kinds or [0] * len(rows))


def _padded(rows: list[list[int]], length: int, kinds: list[int]) -> Samples:
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = labels[place, : len(row)] = torch.tensor(row)
    return Samples(ids, labels, torch.tensor(kinds))


def with_junk(tokenizer: Tokenizer, texts: list[str], length: int, share: float, seed: int) -> Samples:
    """The texts, and so much junk that it is ``share`` of all, of its three kinds alike."""
    draw = random.Random(seed)
    each = round(len(texts) * share / (1 - share) / 3)
    clean = encoded(tokenizer, texts, length)
    rows = [row[row_labels != -100].tolist() for row, row_labels in zip(clean.ids, clean.labels, strict=True)]
    shuffled = [draw.sample(row, len(row)) for row in draw.choices(rows, k=each)]
    foreign = encoded(tokenizer, draw.choices(other_languages(each), k=each), length)
    other = [row[row_labels != -100].tolist() for row, row_labels in zip(foreign.ids, foreign.labels, strict=True)]
    repeated = draw.choices(draw.sample(rows, 3), k=each)
    kinds = [0] * len(rows) + [1] * each + [2] * each + [3] * each
    return _padded([*rows, *shuffled, *other, *repeated], length, kinds)
