"""Build of the native core. Metadata stands in pyproject.toml.

``selbp._native`` is C++17 without torch: every ``csrc/<family>/cpu.cpp`` is compiled once for each x86-64 level
(SELBP_LEVEL names its namespace) and picked at run time; other architectures get the baseline alone.

Environment: MAX_JOBS (parallel compilations), SELBP_CUDA=auto|0|1 and SELBP_CUDA_ARCH (the CUDA core).
"""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LEVELS = {"baseline": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
if platform.machine() not in ("x86_64", "AMD64"):
    LEVELS = {"baseline": []}
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden",
         "-Wall", "-Wextra", "-Werror=return-type"]  # fmt: skip


def relative(pattern: str) -> list[str]:
    """Files below csrc/, relative to the project: setuptools refuses absolute paths."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


class NativeBuild(build_ext):
    """Compiles the per-level kernels once for each level and links them into the extension."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        os.chdir(ROOT)
        include = [str(ROOT / "csrc")]
        jobs = [(source, name, flags) for source in relative("*/cpu.cpp") for name, flags in LEVELS.items()]

        headers = relative("**/*.hpp")
        newest = max(os.path.getmtime(path) for path in ["setup.py", *headers])

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            folder = str(Path(self.build_temp) / name)
            objects = self.compiler.object_filenames([source], output_dir=folder)
            built = os.path.getmtime(objects[0]) if os.path.exists(objects[0]) else 0
            if built > max(newest, os.path.getmtime(source)):
                return objects
            return self.compiler.compile(
                [source], output_dir=folder, include_dirs=include,
                macros=[("SELBP_LEVEL", name)], extra_postargs=FLAGS + flags,
            )  # fmt: skip

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        extension.extra_objects = objects
        super().build_extension(extension)


setup(
    packages=[*find_packages(include=["selbp", "selbp.*"]), "selbp.triton_kernels"],
    # A bare top-level `triton_kernels` would collide with Triton's own package of that name.
    package_dir={"selbp.triton_kernels": "triton_kernels"},
    ext_modules=[
        Pybind11Extension(
            "selbp._native",
            ["csrc/module.cpp"],
            include_dirs=["csrc"],
            depends=relative("**/*.hpp") + relative("*/cpu.cpp"),
            define_macros=[("SELBP_X86_LEVELS", "1")] if len(LEVELS) > 1 else [],
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": NativeBuild},
)
