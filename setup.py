"""Build of the native core. Metadata stands in pyproject.toml.

``selbp._native`` is C++17 without torch: every ``csrc/<family>/cpu.cpp`` is compiled once for each x86-64 level
(SELBP_LEVEL names its namespace) and picked at run time; other architectures get the baseline alone.

``selbp._native_cuda`` is every ``csrc/<family>/cuda.cu``, compiled by nvcc: no GPU and no CUDA build of torch is
needed, and the CUDA runtime is linked statically, so it imports on a machine without a driver.

Environment:
    MAX_JOBS         parallel compilations
    SELBP_CXXFLAGS   added to the C++ compiler's options; -O0 for a quick build that is not for use
    SELBP_CUDA       auto (the default): the CUDA core is built wherever there is nvcc, and left out with a warning
                     where nvcc fails; 0: never; 1: always
    SELBP_CUDA_ARCH  architectures; by default those of "80;90;100" that nvcc compiles for. The last one is embedded
                     as PTX too, for what comes later
"""

from __future__ import annotations

import functools
import os
import platform
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CCompilerError, CompileError

ROOT = Path(__file__).parent
SOURCES = runpy.run_path(str(ROOT / "selbp" / "_sources.py"))["digest"](ROOT)  # the import compares it with its own
# By features, as csrc/cpu/level.hpp asks for them: -march=x86-64-v3 needs GCC 11 or clang 12.
V3 = ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mf16c"]
V4 = [*V3, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS: dict[str, list[str]] = {"baseline": [], "v3": V3, "v4": V4}
if platform.machine() not in ("x86_64", "AMD64"):
    LEVELS = {"baseline": []}
FLAGS = "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden".split()
FLAGS += ["-Wall", "-Wextra", "-Werror=return-type", *os.environ.get("SELBP_CXXFLAGS", "").split()]
ARCHITECTURES = ["80", "90", "100"]
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Werror=all-warnings --threads=0 -Icsrc".split()


def relative(pattern: str) -> list[str]:
    """Files below csrc/, relative to the project: setuptools refuses absolute paths."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def cuda_wish() -> str:
    return os.environ.get("SELBP_CUDA", "auto")


def cuda_wanted() -> bool:
    wish = cuda_wish()
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"SELBP_CUDA must be auto, 0 or 1, got {wish!r}")
    nvcc = find_nvcc()
    if wish == "1" and nvcc is None:
        raise SystemExit(
            "SELBP_CUDA=1, but there is no nvcc. Install the CUDA toolkit and put its bin folder on PATH or its root "
            "in CUDA_HOME; or set SELBP_CUDA=0 to install without the CUDA core."
        )
    return wish != "0" and nvcc is not None  # a driver need not be here: containers mount it, images are built without


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def toolkit_root(nvcc: str) -> Path:
    """The toolkit that this nvcc belongs to, which it says itself: the one on PATH may be a wrapper."""
    said = subprocess.run([nvcc, "-dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(os.environ.get("CUDA_HOME") or Path(nvcc).parents[1])


@functools.cache
def cuda_architectures() -> list[str]:
    """Those of SELBP_CUDA_ARCH, else those of the default that nvcc compiles for: sm_100 came with CUDA 12.8."""
    chosen = [a.strip() for a in re.split("[;, ]", os.environ.get("SELBP_CUDA_ARCH", "")) if a.strip()]
    if chosen:
        return chosen
    command = [find_nvcc() or "nvcc", "--list-gpu-arch"]
    known = re.findall(r"compute_(\d+)", subprocess.run(command, capture_output=True, text=True).stdout)
    return [a for a in ARCHITECTURES if a in known] or ARCHITECTURES


def nvcc_flags() -> list[str]:
    """-fmad=false: a product is fused with a sum where the source says so, and only there, as on the CPU."""
    *others, last = cuda_architectures()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in others]
    targets.append(f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]")
    return [*NVCC_FLAGS, *targets, "-Xcompiler=-fPIC,-Wall,-Wextra,-fvisibility=hidden", "-Xptxas=-v"]


class NativeBuild(build_ext):
    """Compiles the per-level kernels once for each level, the CUDA kernels by nvcc, and links each extension."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        os.chdir(ROOT)
        if extension.name == "selbp._native_cuda":
            return self.build_cuda(extension)
        built_so_far = Path(self.get_ext_fullpath(extension.name))
        self.force = self.force or not (built_so_far.exists() and SOURCES.encode() in built_so_far.read_bytes())
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
            options = {"macros": [("SELBP_LEVEL", name)], "extra_postargs": FLAGS + flags}
            return self.compiler.compile([source], output_dir=folder, include_dirs=include, **options)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        extension.extra_objects = objects
        super().build_extension(extension)

    def build_cuda(self, extension: Pybind11Extension) -> None:
        """The CUDA core. setuptools makes a warning of an error where the extension is optional."""
        try:
            extension.extra_objects = [self.compile_cuda(source) for source in relative("*/cuda.cu")]
            super().build_extension(extension)
        except CCompilerError:
            for path in (self.get_ext_fullpath(extension.name), self.get_ext_filename(extension.name)):
                Path(path).unlink(missing_ok=True)  # one of older sources must not pass for this one
            raise

    def compile_cuda(self, source: str) -> str:
        """One object for all architectures; beside it stands what ptxas said of registers, spills and shared memory.

        Both stay in build/cuda, where a later build finds the first and the tests the second: pip's folder goes away.
        """
        target = Path("build", "cuda", "-".join(cuda_architectures()), source).with_suffix(".cuda.o")
        inputs = ["setup.py", source, *relative("**/*.hpp"), *relative("**/*.cuh")]
        if target.exists() and target.stat().st_mtime > max(os.path.getmtime(path) for path in inputs):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [find_nvcc() or "nvcc", *nvcc_flags(), "-c", source, "-o", str(target)]
        said = subprocess.run(command, capture_output=True, text=True)
        if said.returncode:
            raise CompileError(f"nvcc could not compile {source}:\n{said.stdout}{said.stderr}")
        target.with_suffix(".ptxas.txt").write_text(said.stdout + said.stderr)
        return str(target)


def cuda_extension() -> Pybind11Extension:
    library = toolkit_root(find_nvcc() or "nvcc") / "lib64"
    return Pybind11Extension(
        "selbp._native_cuda",
        ["csrc/module_cuda.cpp"],
        include_dirs=["csrc"],
        depends=[*relative("**/*.hpp"), *relative("**/*.cuh"), *relative("**/*.cu")],
        define_macros=[("SELBP_CUDA_ARCHITECTURES", '"sm_' + ", sm_".join(cuda_architectures()) + ' and PTX"')],
        extra_compile_args=FLAGS,
        library_dirs=[str(library)],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        optional=cuda_wish() != "1",  # where it cannot be built it is left out, with a warning: NVRTC stands in
    )


setup(
    packages=[
        *find_packages(include=["selbp", "selbp.*", "selbp_study", "selbp_study.*"]),
        "selbp.triton_kernels",
        "selbp.cuda_source",
    ],
    # A bare top-level `triton_kernels` would collide with Triton's own package of that name. `cuda_source` holds no
    # Python: what NVRTC is handed where the CUDA core was not built.
    package_dir={"selbp.triton_kernels": "triton_kernels", "selbp.cuda_source": "csrc"},
    package_data={
        "selbp.cuda_source": [
            "matching/*.hpp",
            "matching/kernels.cuh",
            "team/*.hpp",
            "team/*.cuh",
            "selection/*.hpp",
            "selection/*.cuh",
        ]
    },
    ext_modules=[
        Pybind11Extension(
            "selbp._native",
            ["csrc/module.cpp"],
            include_dirs=["csrc"],
            depends=relative("**/*.hpp") + relative("*/cpu.cpp"),
            define_macros=[
                ("SELBP_SOURCES", f'"{SOURCES}"'),
                *([("SELBP_X86_LEVELS", "1")] if len(LEVELS) > 1 else []),
            ],
            extra_compile_args=FLAGS,
            libraries=["gomp"],
        ),
        *([cuda_extension()] if cuda_wanted() else []),
    ],
    cmdclass={"build_ext": NativeBuild},
)
