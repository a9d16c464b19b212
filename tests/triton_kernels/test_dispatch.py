"""Operators on CUDA tensors where there is no GPU: fake tensors, a Triton that is missing, no import of Triton."""

import importlib
import pathlib
import re
import runpy
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from selbp import ops, reference
from selbp.ops import _backends

statistics_operator, residual_operator, gram_operator = (
    importlib.import_module(f"selbp.ops.{name}") for name in ("statistics", "residual", "gram")
)
SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def test_fake_cuda_tensors():
    with FakeTensorMode(allow_non_fake_inputs=False):
        features = torch.empty(8, 16, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(50, 16, device="cuda", dtype=torch.bfloat16)
        target = torch.empty(8, device="cuda", dtype=torch.int64)
        linear = ops.linear_cross_entropy_statistics(features, weight, None, target)
        logits = torch.empty(8, 50, device="cuda")
        stored = ops.cross_entropy_statistics(logits, target)
        r = ops.residual(logits, target, stored.lse)
        gram = ops.gradient_gram(r, features.float())
    for stats in (linear, stored):
        assert all(field.shape == (8,) and field.device.type == "cuda" for field in stats)
        assert stats.loss.dtype == torch.float32 and stats.valid.dtype == torch.bool
    assert r.shape == (8, 50) and gram.shape == (8, 8) and gram.device.type == "cuda"


@pytest.mark.parametrize("script", ["gpu_check.py", "tune_triton.py"])
def test_scripts_for_a_gpu_say_that_there_is_none(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script] + (["sketch"] if script == "tune_triton.py" else []))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    assert caught.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def old_triton(version: str) -> types.ModuleType:
    """What a Triton from before the tensor descriptors looks like to an import."""
    module = types.ModuleType("triton")
    module.__version__ = version
    module.__path__ = []
    return module


UNFIT = {
    "missing": (None, r"Triton is missing .*, 3\.4 or newer is needed.*pip install 'triton>=3\.4'"),
    "too old": (old_triton("3.3.1"), r"Triton 3\.3\.1 is installed, 3\.4 or newer is needed.*pip install"),
    "far too old": (old_triton("2.1.0+git"), r"Triton 2\.1\.0\+git is installed, 3\.4 or newer is needed"),
    "broken": (old_triton("4.0.0"), r"Triton 4\.0\.0 is installed and does not fit \(.*\), 3\.4 or newer"),
}
CALLS = {
    "cross_entropy_statistics": lambda z, y, r: statistics_operator._cuda(
        *statistics_operator._pack(z, y, None, None, -100, 0.0, 0.0, True)
    )[0],
    "residual": lambda z, y, r: residual_operator._cuda(*residual_operator._pack(z, y, r.lse, None, -100, 0.0, 0.0)),
    "gradient_gram": lambda z, y, r: gram_operator._cuda(z, z, True),
}


@pytest.fixture
def unfit(request, monkeypatch):
    """A process in which Triton is missing, or not the one that the kernels need; what the warning must say."""
    module, says = UNFIT[request.param]
    for name in [name for name in sys.modules if name.split(".")[0] == "triton" or "triton_kernels" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", module)
    for cached in (_backends.unavailable, _backends._warn_once):
        cached.cache_clear()
    yield says
    for cached in (_backends.unavailable, _backends._warn_once):
        cached.cache_clear()


@pytest.mark.parametrize("unfit", UNFIT, indirect=True)
@pytest.mark.parametrize("operator", CALLS)
def test_a_triton_that_does_not_fit_is_said_once_and_the_reference_runs(operator, unfit):
    """On CPU tensors, in place of a GPU: what is called is the CUDA implementation."""
    logits, target = torch.randn(5, 7), torch.randint(7, (5,))
    spec = reference.cross_entropy_statistics(logits, target)
    expected = {
        "cross_entropy_statistics": spec.loss,
        "residual": reference.residual(logits, target, spec.lse),
        "gradient_gram": reference.gradient_gram(logits, logits, bias=True),
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # In float64 the reference is what a CUDA tensor would get anyway: nothing to warn of.
        CALLS[operator](logits.double(), target, reference.cross_entropy_statistics(logits.double(), target))
        assert caught == []
        for _ in range(3):
            torch.testing.assert_close(CALLS[operator](logits, target, spec), expected[operator])
    assert [one.category for one in caught] == [RuntimeWarning]
    assert re.search(unfit, str(caught[0].message))


def test_importing_and_running_on_a_cpu_does_not_import_triton():
    code = (
        "import sys, torch, selbp\nfrom selbp import ops\n"
        "ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
