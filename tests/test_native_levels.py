"""The per-level native kernels: none can be linked into another level's path, all agree, and forks do not hang."""

import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.compiled import compile_all
from torch.utils.data import DataLoader, Dataset

from selbp import _native, ops
from selbp.ops._backends import native_threads

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc").glob("*/cpu.cpp"))
x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86-64 levels need x86-64")


def shared_symbols(source: Path) -> list[str]:
    """Symbols of the object compiled from ``source`` that a linker may replace by another object's copy."""
    # Without optimisation nothing is inlined away, so that every such function shows.
    flags = "-std=c++17 -O0 -fPIC -w -mavx2 -mfma -mbmi -mbmi2 -mf16c -DSELBP_LEVEL=v3 -DSELBP_X86_LEVELS=1".split()
    (compiled,) = compile_all([(source, flags, [ROOT / "csrc"])])
    listing = subprocess.run(["nm", "-C", str(compiled)], check=True, capture_output=True, text=True).stdout
    symbols = [line[17:] for line in listing.splitlines()]
    # A name that contains the level's namespace is this level's alone. DW.ref.*: a data pointer, shared by design.
    return [s for s in symbols if s[0] in "WVuvTDBR" and "selbp::v3::" not in s and "DW.ref." not in s]


@x86
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parent.name)
def test_kernels_share_no_symbol_between_levels(source):
    assert shared_symbols(source) == []


@x86
@pytest.mark.skipif(not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm")
def test_an_inline_function_would_be_seen(tmp_path):
    planted = "inline double shared(double x) { return x * x; }\ndouble f(double x) { return shared(x); }\n"
    (tmp_path / "planted.cpp").write_text(planted)
    assert len(shared_symbols(tmp_path / "planted.cpp")) == 2


CASES = """
import sys, torch
from selbp import ops, _native
torch.manual_seed(3)
results = {"level": _native.level()}
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for n, C in ((5, 3), (9, 47), (4, 2500)):
        z = (torch.randn(n, C) * 4).to(dtype); y = torch.randint(C, (n,)); y[1] = -100
        z[2, 1] = -torch.inf; z[3] *= 1e-7
        for options in ({}, {"label_smoothing": 0.1, "softcap": 9.0, "class_weight": torch.rand(C)}):
            stats = ops.cross_entropy_statistics(z, y, z, **options)
            results[f"{dtype} {C} {len(options)}"] = (*stats, ops.residual(z, y, stats.lse, **options))
for n, C, d in ((128, 10, 128), (21, 19, 5)):
    y = torch.randint(C, (n,)); y[1] = -100
    arguments = torch.randn(n, d), torch.randn(C, d) / d, torch.randn(C), y
    results[f"small head {C}"] = tuple(ops.linear_cross_entropy_statistics(*arguments))
for dtype in (torch.float32, torch.float64):
    for n, C, d in ((5, 3, 2), (70, 200, 131)):  # ragged blocks, and more terms than one stretch
        factors = torch.randn(n, C, dtype=dtype) / C**0.5, torch.randn(n, d, dtype=dtype) / d**0.5
        results[f"gram {dtype} {n}"] = (ops.gradient_gram(*factors), ops.mean_gradient(*factors).inner)
"""
SAVE = "torch.save(results, sys.argv[1])"


@x86
def test_levels_agree(tmp_path):
    here: dict = {}
    exec(CASES, here)  # at the level that this process has picked
    results = {"": here["results"]}
    for level in ("baseline", "v3"):
        path = tmp_path / f"level-{level}.pt"
        environment = {**os.environ, "SELBP_CPU_LEVEL": level}
        subprocess.run([sys.executable, "-c", CASES + SAVE, str(path)], check=True, timeout=600, env=environment)
        results[level] = torch.load(path)
    assert results["baseline"].pop("level") == "baseline"
    assert results[""].pop("level") == _native.level()
    assert "v4" not in results["v3"].pop("level")
    for level in ("v3", ""):
        for case, expected in results["baseline"].items():
            for a, b in zip(results[level][case], expected, strict=True):
                tolerance = 1e-12 if "float64" in case else 4e-6
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_an_unknown_level_is_an_error():
    environment = {**os.environ, "SELBP_CPU_LEVEL": "v2"}
    tried = subprocess.run(
        [sys.executable, "-c", "import selbp"], capture_output=True, text=True, timeout=600, env=environment
    )
    assert tried.returncode == 1
    assert tried.stderr.splitlines()[-1] == "ImportError: SELBP_CPU_LEVEL must be baseline, v3 or v4, got 'v2'"


# ------------------------------------------------------------------------------------------------ OpenMP

RUNTIMES = """
import torch, selbp
from selbp import ops
torch.set_num_threads(2)
ops.cross_entropy_statistics(torch.randn(64, 4000), torch.arange(64))
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(*sorted(path for path in mapped if any(name in path for name in ("libgomp", "libomp", "libiomp"))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime():
    """Two runtimes keep two pools of threads, which fight over the cores."""
    ran = subprocess.run([sys.executable, "-c", RUNTIMES], check=True, capture_output=True, text=True, timeout=600)
    runtimes = ran.stdout.split()
    assert len(runtimes) == 1, runtimes


# ------------------------------------------------------------------------------------- forked and spawned workers


def statistics(rows=64):
    """Enough work for more than one thread."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 4000, generator=generator)
    return ops.cross_entropy_statistics(logits, torch.arange(rows)).loss


class Losses(Dataset):
    """Each item is computed natively, in the worker."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return statistics()[index]


def _child(queue):
    queue.put((native_threads(1 << 30), torch.get_num_threads(), float(statistics().sum())))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start):
    torch.set_num_threads(2)
    expected = statistics()[:4]  # the parent's OpenMP threads exist now
    workers = 1 if start == "spawn" else 2  # a spawned one imports torch anew
    loader = DataLoader(Losses(), batch_size=2, num_workers=workers, multiprocessing_context=start, timeout=600)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_a_forked_process_runs_serially():
    torch.set_num_threads(2)
    expected = float(statistics().sum())
    assert native_threads(1 << 30) == 2
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    threads, torch_threads, total = queue.get(timeout=600)
    child.join(timeout=600)
    assert child.exitcode == 0
    assert (threads, torch_threads) == (1, 2)
    assert total == pytest.approx(expected)
