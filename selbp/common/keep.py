"""How many rows a step keeps, and the error of as many drawn at random."""

from __future__ import annotations

from numbers import Integral, Real

from selbp._checks import shown
from selbp._numpy import BOOLS


def check_keep(keep: float | int) -> float | int:
    """``keep`` as Python's own float, a share in (0, 1], or int, a number of samples of at least 1; numpy's are taken.

    Raises TypeError for a bool or anything that is no number, ValueError for a number outside that range.
    """
    meaning = "a float in (0, 1] (a share: 1.0 keeps all) or an int of at least 1 (a number of samples: 1 keeps one)"
    if isinstance(keep, BOOLS) or not isinstance(keep, Real):
        raise TypeError(f"keep must be {meaning}, got {shown(keep)}")
    keep = int(keep) if isinstance(keep, Integral) else float(keep)
    if not (keep >= 1 if isinstance(keep, int) else 0.0 < keep <= 1.0):  # also false for nan
        raise ValueError(f"keep must be {meaning}, got {keep!r}")
    return keep


def kept_rows(keep: float | int, n: int) -> int:
    """How many of ``n`` samples to keep: ``max(1, round(keep * n))`` for a share, ``min(keep, n)`` for a number."""
    return min(int(keep), n) if isinstance(keep, Integral) else max(1, round(keep * n))


def random_error(n: int, valid: int, k: int, gradient_sq: float, target_sq: float) -> float:
    """E ||mean - (v / (n k)) sum_S g||^2 over uniform subsets S of k of the v valid rows, without replacement.

    ``gradient_sq`` is sum_i ||g_i||^2 over valid rows and ``target_sq`` is ||(1/n) sum g_i||^2. The variance of the
    mean of k of v without replacement, ``(v - k) / (k (v - 1)) * (sum ||g||^2 / v - ||mean||^2)``, scaled by (v/n)^2.
    """
    if k >= valid or valid < 2:
        return 0.0
    spread = max(gradient_sq / valid - target_sq * (n / valid) ** 2, 0.0)
    return (valid / n) ** 2 * (valid - k) / (k * (valid - 1)) * spread
