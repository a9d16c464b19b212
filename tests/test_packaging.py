"""Wheel, sdist -> wheel and editable installs, each from an empty environment with an isolated build.

The slow tests compile. The fast one does not: whoever runs it has compiled the same sources a moment ago, so a stand-in
for the compiler hands over this installation's extension, and what is tested is the package around it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

import selbp

ROOT = Path(__file__).parents[1]
COPIED = [
    "csrc",
    "triton_kernels",
    "selbp",
    "selbp_study",
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
]
OUTER = sorted({sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])})  # where torch is
OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may name these sources
NO_INDEX = ("No matching distribution found for", "Could not fetch URL", "NewConnectionError", "Read timed out")
SMOKE = """
import sys, torch, selbp, selbp._native, selbp.triton_kernels
assert "triton" not in sys.modules, "importing selbp must not import triton"
from selbp.ops import _nvrtc
_nvrtc.sources()  # the kernels that NVRTC compiles
step = selbp.SelectiveBackprop(torch.nn.Sequential(torch.nn.Linear(4, 3)), selector=selbp.GradientMatching(), keep=2)
step(torch.randn(8, 4), torch.randint(0, 3, (8,))).backward()
print(selbp.__file__, selbp.__version__, selbp._native.level())
"""


STAND_IN = """#!/bin/sh
out=; linked=
while [ $# -gt 0 ]; do
  case $1 in -o) out=$2; shift ;; -shared) linked=1 ;; esac
  shift
done
if [ -n "$linked" ]; then cp '{extension}' "$out"; elif [ -n "$out" ]; then : > "$out"; fi
"""


def run(*command, cwd, **environment):
    # What is tested is the package: nvcc and the optimizer would take minutes that the build under test has spent.
    env = {**OUTSIDE, "SELBP_CUDA": "0", "SELBP_CXXFLAGS": "-O0", **environment}
    result = subprocess.run(list(map(str, command)), cwd=cwd, text=True, capture_output=True, timeout=600, env=env)
    said = result.stdout + result.stderr
    if result.returncode != 0 and any(reason in said for reason in NO_INDEX):
        pytest.skip("needs a package index that answers: a build in isolation fetches what it builds with")
    assert result.returncode == 0, said
    return result.stdout


@pytest.fixture
def source(tmp_path):
    """A copy of the sources without anything that was built."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def empty(tmp_path):
    """Python of an environment that holds nothing of selbp; the outer one lends it torch through a path file."""
    folder = tmp_path / "venv"
    venv.create(folder)  # without pip: the outer one installs into it
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(purelib, "outer.pth").write_text("\n".join(OUTER))  # its own path files are not read: no editable selbp
    lacking = "from importlib.util import find_spec; print(find_spec('torch') is not None, find_spec('selbp') is None)"
    assert run(python, "-c", lacking, cwd=tmp_path) == "True True\n"
    return python


def install(python, *what, cwd, **environment):
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", *what, cwd=cwd, **environment)


def check(python, tmp_path, inside):
    said = run(python, "-c", SMOKE, cwd=tmp_path)
    assert str(inside) in said, said


def test_wheel(source, empty, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text(STAND_IN.format(extension=selbp._native.__file__))
    compiler.chmod(0o755)
    install(empty, source, cwd=tmp_path, CC=str(compiler), CXX=str(compiler))
    check(empty, tmp_path, tmp_path / "venv")
    assert "compare" in run(empty.parent / "selbp", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_sdist_then_wheel(source, empty, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, source, cwd=tmp_path)
    (sdist,) = tmp_path.glob("selbp-*.tar.gz")
    install(empty, sdist, cwd=tmp_path)
    check(empty, tmp_path, tmp_path / "venv")


@pytest.mark.slow
def test_editable(source, empty, tmp_path):
    install(empty, "-e", source, cwd=tmp_path)
    check(empty, tmp_path, source)


def test_source_tree_without_the_extension_says_what_to_do(source):
    # -S leaves out path files, and with them an editable install of this very project
    command = [sys.executable, "-S", "-c", "import selbp"]
    path = os.pathsep.join([str(source), *OUTER])
    env = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, env=env)
    assert result.returncode != 0
    assert "pip install" in result.stderr and "not built" in result.stderr


def test_an_extension_of_other_sources_says_what_to_do(source):
    """Sources that were pulled and not compiled: the extension of this very installation, beside changed sources."""
    if not (ROOT / "csrc").exists() or Path(selbp._native.__file__).parent != ROOT / "selbp":
        pytest.skip("needs an editable install")
    shutil.copy(selbp._native.__file__, source / "selbp")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), *OUTER])}
    command = [sys.executable, "-S", "-c", "import selbp; print(selbp.__file__)"]
    same = subprocess.run(command, cwd=source, capture_output=True, text=True, env=env)
    assert same.returncode == 0 and str(source) in same.stdout, same.stderr
    with (source / "csrc" / "module.cpp").open("a") as file:
        file.write("// a change\n")
    changed = subprocess.run(command, cwd=source, capture_output=True, text=True, env=env)
    (line,) = (line for line in changed.stderr.splitlines() if line.startswith("ImportError"))
    assert "built from other sources" in line and f"pip install -e {source}" in line


def test_build_requirements_are_setuptools_and_pybind11_only():
    text = (ROOT / "pyproject.toml").read_text()
    requires = text.split("requires = [")[1].split("]")[0]
    assert [part.strip(' "').split(">")[0] for part in requires.split(",")] == ["setuptools", "pybind11"]


LACKING = """
import runpy, sys
sys.argv = ["install.py"]
install = runpy.run_path("scripts/install.py")
print(install["missing"](install["requirements"](["test"])))
"""


@pytest.mark.slow
def test_an_environment_that_reuses_a_torch_reuses_all_beside_it(tmp_path):
    """Without a network: what is there must not be hidden by what a new environment begins with (its setuptools)."""
    here = subprocess.run([sys.executable, "-c", LACKING], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    if here.strip() != "[]":
        pytest.skip(f"needs an environment with everything that the tests need: {here.strip()}")
    made = {**OUTSIDE, "PYTHON": sys.executable, "VENV": str(tmp_path / "venv"), "TORCH": "auto"}
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    command = ["bash", "scripts/environment.sh"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env={**made, **nowhere})
    assert done.returncode == 0, done.stdout + done.stderr
    command = [str(tmp_path / "venv" / "bin" / "python"), "-c", LACKING]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=OUTSIDE).stdout == "[]\n"
