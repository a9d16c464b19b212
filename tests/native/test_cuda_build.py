"""The CUDA core where there is no GPU: what the compiler made of each kernel, and that the module imports."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import pytest
import torch

from selbp import info
from selbp.ops import _cuda_solver

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# kernel -> (most registers, most bytes of spills, most bytes of static shared memory), for every architecture.
# 512 threads of 128 registers are all that a multiprocessor has; a block of match_grid has 128 threads.
BUDGETS = {
    "match_blocks<float, shared>": (128, 0, 0),
    "match_blocks<float, global>": (128, 0, 0),
    "match_blocks<double, shared>": (128, 0, 0),
    "match_blocks<double, global>": (128, 0, 0),
    "match_grid<float>": (255, 0, 0),
    "match_grid<double>": (255, 0, 0),
    "choose_kernel": (128, 0, 0),
    "balanced_kernel": (128, 0, 0),
    "diverse_kernel": (128, 0, 0),
}
FAMILIES = ("matching", "selection")  # whose cuda.cu hold them


def kernel_name(mangled):
    if plain := re.search(r"(choose|balanced|diverse)_kernel", mangled):
        return plain[0]
    found = re.search(r"(match_blocks|match_grid)I([fd])(?:Lb([01]))?E", mangled)
    assert found, mangled
    where = {None: "", "1": ", shared", "0": ", global"}[found[3]]
    return f"{found[1]}<{ {'f': 'float', 'd': 'double'}[found[2]] }{where}>"


def parse(text):
    """{(architecture, kernel): (registers, spilled bytes, static shared bytes)} from what ptxas -v said."""
    table = {}
    for block in re.split(r"Compiling entry function ", text)[1:]:
        mangled, architecture = re.match(r"'(\w+)' for '(\w+)'", block).groups()
        spills = sum(map(int, re.findall(r"(\d+) bytes spill", block)))
        shared = re.search(r"(\d+) bytes smem", block)
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        table[architecture, kernel_name(mangled)] = registers, spills, int(shared[1]) if shared else 0
    return table


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ptxas said: of the last build where that is newer than the sources, else of a build for sm_90 alone."""
    sources = [*ROOT.glob("csrc/**/*.hpp"), *ROOT.glob("csrc/**/*.cu*")]
    newest = max(path.stat().st_mtime for path in sources)
    reports = [report for family in FAMILIES for report in ROOT.glob(f"build/cuda/**/{family}/cuda.cuda.ptxas.txt")]
    fresh = [report.read_text() for report in reports if report.stat().st_mtime > newest]
    if len(fresh) >= len(FAMILIES):
        return parse("".join(fresh))
    if NVCC is None:
        pytest.skip("needs nvcc")
    said = [_ptxas(family, tmp_path_factory.mktemp("cuda") / "cuda.cubin") for family in FAMILIES]
    return parse("".join(said))


def _ptxas(family, cubin):
    """What ptxas says of a family's kernels for sm_90; kept where the next run finds it."""
    command = [NVCC, "-std=c++17", "-O3", "-fmad=false", "-Werror=all-warnings", "-Xptxas=-v", "-Icsrc", "-arch=sm_90"]
    command += ["-cubin", f"csrc/{family}/cuda.cu", "-o", str(cubin)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kept = ROOT / "build" / "cuda" / "tests" / family / "cuda.cuda.ptxas.txt"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(done.stdout + done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_their_budgets(compiled, architecture):
    found = {kernel: used for (arch, kernel), used in compiled.items() if arch == architecture}
    if not found:
        pytest.skip(f"not compiled for {architecture} here: build with SELBP_CUDA=1 first")
    assert found.keys() == BUDGETS.keys()
    over = {
        k: (used, BUDGETS[k]) for k, used in found.items() if any(u > b for u, b in zip(used, BUDGETS[k], strict=True))
    }
    assert not over


def test_the_parser_sees_spills_and_shared_memory():
    text = (
        "ptxas info : Compiling entry function '_ZN5selbp6device10match_gridIdEEv' for 'sm_90'\n"
        "    72 bytes stack frame, 88 bytes spill stores, 212 bytes spill loads\n"
        "ptxas info : Used 130 registers, used 1 barriers, 4096 bytes smem\n"
    )
    assert parse(text) == {("sm_90", "match_grid<double>"): (130, 300, 4096)}


def test_the_cuda_module_imports_without_a_driver_and_says_what_is_missing():
    pytest.importorskip("selbp._native_cuda", reason="built with SELBP_CUDA=1 only")
    code = (
        "import torch\nif torch.cuda.is_available(): raise SystemExit(0)\n"
        "from selbp import _native_cuda as core\nassert 'sm_' in core.architectures()\n"
        "try:\n    core.match_workspace(1, False, 128, 32, 0)\n"
        "except RuntimeError as error:\n    error_of_match = error\n    assert str(error).startswith('CUDA: ')\n"
        "else:\n    raise SystemExit('no error without a device')\n"
        "status = core.probe(0)\nassert status and core.error_text(status) in str(error_of_match), status\n"
        "from selbp.ops import _cuda_solver\nassert f'({status})' in _cuda_solver.refusal(core, 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
    module = next(ROOT.glob("selbp/_native_cuda*.so"))
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True).stdout
    assert "libcudart" not in needed and "libcuda." not in needed


def test_selbp_info_says_on_which_device_the_core_does_not_run(monkeypatch):
    core = types.SimpleNamespace(architectures=lambda: "sm_80 and PTX")
    monkeypatch.setitem(sys.modules, "selbp._native_cuda", core)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(_cuda_solver, "refusal", lambda core, device: "" if device else "not on cuda:0: no code")
    monkeypatch.setattr(info._nvrtc, "Compiler", lambda: types.SimpleNamespace(version="12.8"))
    assert info._cuda_core() == (
        "built for sm_80 and PTX; not on cuda:0: no code; NVRTC 12.8 compiles its kernels when a GPU first needs them"
    )
    monkeypatch.setattr(_cuda_solver, "refusal", lambda core, device: "")
    assert info._cuda_core() == "built for sm_80 and PTX"


@pytest.mark.parametrize("value,said", [("1", "there is no nvcc"), ("maybe", "must be auto, 0 or 1")])
def test_the_build_switch_explains_itself(value, said):
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    environment.update(SELBP_CUDA=value, PATH="/nonexistent")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode != 0 and said in run.stderr


PRINT_MODULES = """
import setuptools
setuptools.setup = lambda **given: print(*(module.name for module in given["ext_modules"]))
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""


@pytest.mark.parametrize("value,built", [("auto", True), (None, True), ("1", True), ("0", False)], ids=str)
def test_the_cuda_core_is_built_wherever_nvcc_is(tmp_path, value, built):
    """No driver is asked for: where one is mounted late, or an image is built without one, none can be found."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}' >&2\n")
    nvcc.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "SELBP_CUDA")}
    environment.update({"PATH": str(tmp_path)}, **({"SELBP_CUDA": value} if value else {}))
    run = subprocess.run(
        [sys.executable, "-c", PRINT_MODULES], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert ("selbp._native_cuda" in run.stdout.split()) == built


PRINT_ARCHITECTURES = """
import runpy, setuptools
setuptools.setup = lambda **given: None
build = runpy.run_path("setup.py")
print(*build["cuda_architectures"](), *(flag for flag in build["nvcc_flags"]() if "gencode" in flag))
"""


def stand_in(folder, known, then="exit 0"):
    """An nvcc that says that it knows these architectures, and does ``then`` in place of compiling."""
    nvcc = folder / "nvcc"
    listed = " ".join(f"compute_{a}" for a in known)
    nvcc.write_text(
        f'#!/bin/sh\ncase "$*" in\n  *dryrun*) echo "#\\$ TOP={folder}" >&2 ;;\n'
        f"  *list-gpu-arch*) printf '%s\\n' {listed} ;;\n  *) {then} ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return {k: v for k, v in os.environ.items() if not k.startswith(("SELBP_CUDA", "CUDA_"))}


@pytest.mark.parametrize(
    ("known", "chosen", "wanted"),
    [
        ((75, 80, 86, 89, 90), None, "80 90"),
        ((75, 80, 90, 100, 120), None, "80 90 100"),
        ((90, 100, 120), None, "90 100"),
        ((), None, "80 90 100"),
        ((75, 80, 86, 89, 90), "100", "100"),
        ((75, 80, 86, 89, 90), "75;80", "75 80"),
    ],
    ids=str,
)
def test_an_older_nvcc_is_asked_for_what_it_knows(tmp_path, known, chosen, wanted):
    environment = {**stand_in(tmp_path, known), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    environment |= {"SELBP_CUDA_ARCH": chosen} if chosen else {}
    run = subprocess.run(
        [sys.executable, "-c", PRINT_ARCHITECTURES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    *others, last = wanted.split()
    flags = [*(f"-gencode=arch=compute_{a},code=sm_{a}" for a in others)]
    flags.append(f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]")
    assert run.stdout.split() == [*wanted.split(), *flags]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_this_nvcc_compiles_for_what_is_chosen():
    environment = {k: v for k, v in os.environ.items() if k != "SELBP_CUDA_ARCH"}
    run = subprocess.run(
        [sys.executable, "-c", PRINT_ARCHITECTURES], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    chosen = re.findall(r"(?<!\S)\d+(?!\S)", run.stdout)
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    assert chosen and {f"compute_{a}" for a in chosen} <= set(listed)


COPIED = ("csrc", "triton_kernels", "selbp", "selbp_study", "setup.py", "pyproject.toml", "README.md", "LICENSE")
CXX = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -o) : > "$2" ;; esac
  shift
done
"""


@pytest.mark.parametrize("value", ["auto", None, "1"], ids=str)
def test_an_nvcc_that_fails_leaves_the_core_out_unless_it_is_asked_for(tmp_path, value):
    """By stand-ins for both compilers: what is tested is which extensions the build is content with."""
    source, tools = tmp_path / "source", tmp_path / "tools"
    source.mkdir(), tools.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    stale = source / "selbp" / ("_native_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    stale.write_bytes(b"of older sources")
    (tools / "c++").write_text(CXX)
    (tools / "c++").chmod(0o755)
    environment = stand_in(tools, (80, 90), then='echo "nvcc fatal: no host compiler" >&2; exit 1')
    environment |= {"PATH": f"{tools}:/usr/bin:/bin", "CC": str(tools / "c++"), "CXX": str(tools / "c++")}
    environment |= {"SELBP_CUDA": value} if value else {}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=600)
    said = run.stdout + run.stderr
    assert "nvcc could not compile csrc/matching/cuda.cu" in said and "nvcc fatal: no host compiler" in said
    assert (run.returncode == 0) == (value != "1"), said
    built = {path.name.split(".")[0] for path in (source / "selbp").glob("*.so")}
    assert built == (set() if value == "1" else {"_native"})
