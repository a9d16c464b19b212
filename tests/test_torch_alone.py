"""The library where torch is installed and nothing else: each test is a process that finds no other package."""

from __future__ import annotations

import json
import subprocess
import sys

BLOCKED = ("numpy", "tqdm", "matplotlib", "scipy", "sklearn", "triton", "pandas")
ALONE = f"""
import importlib.metadata, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {BLOCKED} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

def version(package, found=importlib.metadata.version):
    if package.replace("scikit-learn", "sklearn") in {BLOCKED}:
        raise importlib.metadata.PackageNotFoundError(package)
    return found(package)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
importlib.metadata.version = version
import torch
"""
STEP = """
import selbp
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
for backward in ("rows", "recompute"):
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=4, backward=backward)
    step(torch.randn(16, 4), torch.randint(0, 3, (16,))).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and step.report.loss > 0
assert selbp.diagnose(model, (torch.randn(16, 4), torch.randint(0, 3, (16,))))
"""
OTHERS = """
import json
before = set(sys.modules)
import selbp
ours = {"selbp", *(before & set(sys.stdlib_module_names))}  # a package of Python's own may load the rest of itself
print(json.dumps(sorted(name for name in set(sys.modules) - before if name.split(".")[0] not in ours)))
"""


def alone(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", ALONE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_step_needs_torch_alone() -> None:
    done = alone(STEP)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_import_brings_nothing_else() -> None:
    """Its own modules are read in a tenth of a second; what takes longer is another package, or a part of torch."""
    assert json.loads(alone(OTHERS).stdout) == []


def test_info_says_what_is_missing() -> None:
    done = alone("from selbp_study.cli import main\nsys.exit(main(['info', '--json']) or main(['info']))")
    assert done.returncode == 0, done.stderr[-3000:]
    form, end = json.JSONDecoder().raw_decode(done.stdout)
    for lines in (form, dict(line.split(maxsplit=1) for line in done.stdout[end:].strip().splitlines())):
        for package in ("numpy", "tqdm"):
            assert lines[package] == "not installed: train, compare and study need it (pip install 'selbp[study]')"
        assert lines["matplotlib"].startswith("not installed: ") and lines["scikit-learn"].startswith("not installed: ")
        assert lines["triton"].startswith("not installed. CUDA tensors use the reference implementation")


def test_what_is_blocked_would_be_missed() -> None:
    code = f"""
for package in {BLOCKED}:
    try:
        __import__(package)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert alone(code).stdout.split() == list(BLOCKED)
