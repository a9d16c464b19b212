"""``selbp info``: versions, what was built, what is in use, and why something is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

import selbp._native as native
from selbp._version import __version__
from selbp.ops import _backends, _cuda_solver, _nvrtc


def machine() -> dict[str, str]:
    """The machine and the versions, in words, for a report."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "processor": f"{processor()}, {os.cpu_count()} logical cores{gpu}",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "versions": f"selbp {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "threads": f"{torch.get_num_threads()} (torch), kernels of level {native.level()}",
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _wanted_by(package: str, what: str, extra: str) -> str:
    version = _version(package)
    return version if version != "not installed" else f"{version}: {what} (pip install 'selbp[{extra}]')"


def _cuda_core() -> str:
    try:
        core = importlib.import_module("selbp._native_cuda")
    except ImportError as error:
        return f"not built ({error}); {_without_core()}"
    built = f"built for {core.architectures()}" if hasattr(core, "architectures") else "built"
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    refused = [reason for i in devices if (reason := _cuda_solver.refusal(core, i))]
    return "; ".join([built, *refused, _without_core()] if refused else [built])


def _without_core() -> str:
    try:
        return f"NVRTC {_nvrtc.Compiler().version} compiles its kernels when a GPU first needs them"
    except _nvrtc.Unavailable as missing:
        return f"CUDA tensors are matched on the host: {missing}"


def _cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this torch was built for the CPU alone"
    if not torch.cuda.is_available():
        return f"torch was built for CUDA {torch.version.cuda}, but finds no device: no driver, or none is visible"
    names = ", ".join(
        f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    )
    return f"{names}; CUDA {torch.version.cuda}"


def _triton() -> str:
    version = _version("triton")
    if version == "not installed":
        return f"not installed. {_backends.INSTEAD}"
    if not torch.cuda.is_available():
        return f"{version}, idle: there is no GPU, and CPU tensors use the native core"
    reason = _backends.unavailable()
    return version if reason is None else reason


def information() -> dict[str, str]:
    """Everything that ``selbp info`` prints, by name."""
    return {
        "selbp": f"{__version__}, {Path(__file__).parent}",
        "python": f"{platform.python_version()}, {sys.executable}",
        "torch": torch.__version__,
        "numpy": _wanted_by("numpy", "train, compare and study need it", "study"),
        "tqdm": _wanted_by("tqdm", "train, compare and study need it", "study"),
        "triton": _triton(),
        "processor": machine()["processor"],
        "native core": f"built, {native.__file__}",
        "CPU level in use": native.level(),
        "threads": f"{torch.get_num_threads()} (torch), {os.cpu_count()} logical cores",
        "CUDA core": _cuda_core(),
        "CUDA": _cuda(),
        "matplotlib": _wanted_by("matplotlib", "compare and study need it", "study"),
        "scikit-learn": _wanted_by("scikit-learn", "the digits come from it", "demo"),
    }
