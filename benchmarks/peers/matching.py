"""Orthogonal matching pursuit and NNLS as others offer them. A package that is not installed is ``Unavailable``.

scikit-learn   ``orthogonal_mp_gram``: from the Gram matrix, weights of either sign
SciPy          ``optimize.nnls``: from a matrix, float64
SPAMS          ``omp`` (pip install spams-bin): from a matrix, builds its own Gram matrix
CORDS          ``OrthogonalMP_REG_Parallel_V1`` (pip install --no-deps cords): GradMatch's, from a matrix
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType

import numpy as np
import torch

from benchmarks.harness import Unavailable
from benchmarks.peers import missing, one_file

Array = np.ndarray


def scikit_learn() -> Callable[[Array, Array, int], Array] | Unavailable:
    """(gram, inner, k) -> dense weights."""
    try:
        from sklearn.linear_model import orthogonal_mp_gram
    except ImportError as error:
        return missing("scikit-learn", error)

    def solve(gram: Array, inner: Array, k: int) -> Array:
        with warnings.catch_warnings():  # it warns on every call that ends before k rows
            warnings.simplefilter("ignore", RuntimeWarning)
            return orthogonal_mp_gram(gram, inner, n_nonzero_coefs=k)

    return solve


def scipy_nnls() -> Callable[[Array, Array], Array] | Unavailable:
    """(factor, target) -> dense weights."""
    try:
        from scipy.optimize import nnls
    except ImportError as error:
        return missing("scipy", error)
    return lambda factor, target: nnls(factor, target)[0]


def spams() -> Callable[[Array, Array, int], Array] | Unavailable:
    """(factor, target, k) -> dense weights; one thread.

    It takes columns of norm 1 for granted, so they are scaled; without ``eps`` it reads one that nobody set and may
    stop before the first row.
    """
    try:
        import spams as module
    except ImportError as error:
        return missing("spams-bin", error)

    def solve(factor: Array, target: Array, k: int) -> Array:
        norms = np.linalg.norm(factor, axis=0)
        norms[norms == 0.0] = 1.0
        columns, goal = np.asfortranarray(factor / norms), np.asfortranarray(target[:, None])
        found = module.omp(goal, columns, L=k, eps=0.0, numThreads=1)
        return found.toarray()[:, 0] / norms

    return solve


def cords_solvers() -> ModuleType:
    """CORDS' file of solvers alone."""
    errors = np.geterr()
    module = one_file("cords", "selectionstrategies", "helpers", "omp_solvers.py")
    np.seterr(**errors)  # it changes numpy's error state on import
    return module


def cords() -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor] | Unavailable:
    """(factor, target, k) -> dense weights, with GradMatch's own settings (lam = 0.5, positive)."""
    try:
        solver = cords_solvers().OrthogonalMP_REG_Parallel_V1
    except (ImportError, FileNotFoundError) as error:
        return missing("cords", error)
    return lambda factor, target, k: solver(factor, target, tol=0.0, nnz=k, positive=True, lam=0.5)
