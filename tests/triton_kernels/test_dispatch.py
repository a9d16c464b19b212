"""Operators on CUDA tensors where there is no GPU: fake tensors, a Triton that is missing, no import of Triton."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from selbp import ops, reference
from selbp.ops import _triton

statistics_operator = importlib.import_module("selbp.ops.statistics")
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
def test_scripts_for_a_gpu_say_that_there_is_none(script):
    command = [sys.executable, str(SCRIPTS / script)] + (["sketch"] if script == "tune_triton.py" else [])
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


def test_missing_triton_is_said_and_the_reference_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    _triton.unavailable.cache_clear()
    try:
        reason = _triton.unavailable()
        assert reason is not None and "pip install triton" in reason
        logits, target = torch.randn(5, 7), torch.randint(7, (5,))
        got = statistics_operator._cuda(logits, target, None, None, -100, 0.0, 0.0, True)
        spec = reference.cross_entropy_statistics(logits, target)
        assert all(torch.equal(a, b) for a, b in zip(got, spec, strict=True))
    finally:
        _triton.unavailable.cache_clear()


def test_importing_and_running_on_a_cpu_does_not_import_triton():
    code = (
        "import sys, torch, selbp\nfrom selbp import ops\n"
        "ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
