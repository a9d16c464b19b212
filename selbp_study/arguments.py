"""What the command line's options take: each reader says what was expected and what came."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

MOST = 10**9  # steps, samples, rows: far above what is meant, and far below what takes all memory
MOST_SEEDS = 10_000
MOST_THREADS = 1024
SEEDS = 1 << 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def wrong(expected: str, text: str) -> argparse.ArgumentTypeError:
    """The error of an option whose value ``text`` is not what was ``expected``."""
    return argparse.ArgumentTypeError(f"must be {expected}, got {text!r}")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A reader of whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise wrong(f"a whole number from {least} to {most}", text)
        return value

    return read


count_argument = whole(1)
threads_argument = whole(0, MOST_THREADS)
seed_argument = whole(0, SEEDS - 1)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise wrong("a number above 0", text)
    return value


def keep_argument(text: str) -> float | int:
    """``0.25`` is a share, ``32`` a number of samples; ``1`` is one sample and ``1.0`` all of them."""
    try:
        value: float | int = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
    if not (1 <= value <= MOST if isinstance(value, int) else 0.0 < value <= 1.0):
        raise wrong("a share in (0, 1] such as 0.25 (1.0 is all), or a number of samples such as 32", text)
    return value


def list_argument(text: str) -> list[str]:
    """``a,b`` as a list; a comma inside a selector's options is written ``;``."""
    found = [part.strip().replace(";", ",") for part in text.split(",") if part.strip()]
    if not found:
        raise wrong("names with commas between them, such as random,matching", text)
    return found


def rates_argument(text: str) -> list[float]:
    """``0.02,0.05`` as floats."""
    try:
        rates = [above_zero(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        rates = []
    if not rates or len(set(rates)) < len(rates):
        raise wrong("rates above 0, none of them twice, such as 0.02,0.05,0.1", text)
    return rates


def seeds_argument(text: str) -> list[int]:
    """``0,1,4`` or ``0-4`` as a list of numbers."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            span = range(int(first), int(last) + 1) if dash else [int(first)]
            if not span or len(seeds) + len(span) > MOST_SEEDS:
                raise ValueError(part)
            seeds += span
    except (ValueError, OverflowError):
        raise wrong(f"seeds such as 0-4 (the lower one first) or 0,1,7, at most {MOST_SEEDS}", text) from None
    if max(seeds) >= SEEDS or len(set(seeds)) < len(seeds):
        raise wrong("seeds below 2^32, none of them twice, such as 0-4 or 0,1,7", text)
    return seeds


def name_argument(text: str) -> str:
    """A name that is a part of a file's."""
    if not NAME.fullmatch(text):
        raise wrong("letters, digits, dots, - and _, beginning with a letter or digit", text)
    return text
