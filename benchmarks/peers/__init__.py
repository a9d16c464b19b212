"""Solvers, selection rules and heads of others, under one signature per task; each module says where they come from.

A peer is a function that takes nothing and returns a callable of its module's signature, or ``Unavailable`` with the
reason and the command that installs it. None of their code is here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType

import torch

from benchmarks.harness import Unavailable

# distribution -> how to install it: some need dependencies only for what is not used here
INSTALL = {
    "scikit-learn": "pip install scikit-learn",
    "scipy": "pip install scipy",
    "spams-bin": "pip install spams-bin",
    "cords": "pip install --no-deps cords",
    "mosaicml": "pip install --no-deps mosaicml",
    "liger-kernel": "pip install liger-kernel",
    "cut-cross-entropy": "pip install cut-cross-entropy",
}
_MODULES = {"liger-kernel": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def missing(distribution: str, error: object = "not installed") -> Unavailable:
    """Says that ``distribution`` is not there, and how it gets there."""
    return Unavailable(f"{distribution}: {error} ({INSTALL[distribution]})")


def one_file(package: str, *path: str, around: AbstractContextManager[None] | None = None) -> ModuleType:
    """The module in one file of an installed ``package``, whose own import needs much that the file does not.

    It is executed within ``around``.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"No module named {package!r}")
    file = Path(found.submodule_search_locations[0], *path)
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with around or nullcontext():
        spec.loader.exec_module(module)
    return module


def on_a_gpu(distribution: str) -> Unavailable | None:
    """Why a peer that runs on a GPU only does not run; None where it does."""
    if not torch.cuda.is_available():
        return Unavailable(f"{distribution} runs on a GPU only")
    return None if importlib.util.find_spec(_MODULES[distribution]) else missing(distribution)


def versions() -> dict[str, str]:
    """Version of each installed peer."""
    found = {}
    for distribution in INSTALL:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
