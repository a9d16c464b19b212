"""The matching of CUDA tensors where there is no solver for the GPU: one copy each way, a word of warning, refusals."""

import importlib
import warnings

import pytest
import torch

from selbp import ops
from selbp.ops import _cuda_solver, _host_solve, _nvrtc_core

matching = importlib.import_module("selbp.ops.matching")


def problem(dtype, batch, n=12):
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(*batch, n, 6, generator=generator, dtype=torch.float64) + 0.3
    target = rows.mean(-2)
    return [x.to(dtype) for x in (rows @ rows.mT, (rows @ target[..., None])[..., 0], target.square().sum(-1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_what_came_by_the_host_is_what_the_host_gives(dtype, batch, masked):
    inputs = problem(dtype, batch)
    valid = torch.arange(12) % 5 != 0 if masked else None
    wanted = ops.match(*inputs, 5, valid=valid)
    mask = None if valid is None else valid.expand(inputs[1].shape)
    found = matching._on_host(*inputs, 5, "ols", 1e-3, True, mask, 0.0, pin=False)
    for name, ours, theirs in zip(wanted._fields, found, wanted, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.is_contiguous(), name
        assert ours.storage_offset() * ours.element_size() % _host_solve.ALIGNED == 0


def test_one_copy_each_way(monkeypatch):
    """Between devices: what is packed on one, and what is unpacked on the other."""
    moved = []
    copy, to = torch.Tensor.copy_, torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, x, *a: (moved.append(x.numel()), copy(self, x, *a))[1])
    there = _host_solve.to_host(problem(torch.float32, ()), torch.float32, pin=False)
    assert moved == [12 * 12 + 12 + 1] and [tuple(x.shape) for x in there] == [(12, 12), (12,), ()]
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    moved.clear()

    def counting(self, *arguments, **options):
        if options.get("non_blocking"):
            moved.append(self.dtype)
        return to(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "to", counting)
    matching._on_host(*problem(torch.float32, ()), 5, "ols", 1e-3, True, None, 0.0, pin=False)
    assert moved == [torch.uint8]


@pytest.fixture
def without_a_solver(monkeypatch):
    """As on a GPU without the core: the host's solver is handed CPU tensors."""
    host = matching._on_host
    monkeypatch.setattr(_cuda_solver, "cuda_core", lambda: (None, "not built"))
    monkeypatch.setattr(_nvrtc_core, "core", lambda device, is_double: "there is no libnvrtc")
    monkeypatch.setattr(matching, "_on_host", lambda *a, pin: host(*a, pin=False))
    monkeypatch.setattr(_cuda_solver, "_warned", set())
    return problem(torch.float32, ())


def test_the_first_host_solve_warns_and_says_what_helps(without_a_solver, monkeypatch):
    monkeypatch.setattr(matching, "capturing", lambda device: False)
    solve = (*without_a_solver, 5, "ols", 1e-3, True, None, 0.0)
    with pytest.warns(UserWarning, match="solved on the host.*not built; there is no libnvrtc.*pip install") as said:
        matching._cuda(*solve)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matching._cuda(*solve)


def test_a_capture_refuses_the_host_and_says_why(without_a_solver, monkeypatch):
    monkeypatch.setattr(matching, "capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph.*solved on the host.*not built"):
        matching._cuda(*without_a_solver, 5, "ols", 1e-3, True, None, 0.0)


def test_a_problem_too_large_for_a_block_goes_to_the_host(monkeypatch):
    small = type("Core", (), {"fits": lambda self, n, k: n < 100})()
    monkeypatch.setattr(_cuda_solver, "cuda_core", lambda: (None, "not built"))
    monkeypatch.setattr(_nvrtc_core, "core", lambda device, is_double: small)
    assert _cuda_solver.solver(0, 50, 5, False) == (small, "")
    found, why = _cuda_solver.solver(0, 100, 5, False)
    assert found is None and "n = 100 with k = 5" in why


class BuiltCore:
    """The built core on devices that answer its question so."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def probe(self, device):
        self.asked.append(device)
        return self.answers.pop(0)

    def error_text(self, code):
        return f"words for {code}"

    def launch_choice(self):
        pass


@pytest.mark.parametrize("status", [209, 35], ids=["no code for the device", "a driver that is too old"])
def test_a_core_that_does_not_run_on_the_device_is_not_used(monkeypatch, status):
    core, small = BuiltCore(status, 0), type("Core", (), {"fits": lambda self, n, k: n < 100})()
    monkeypatch.setattr(_cuda_solver, "cuda_core", lambda: (core, ""))
    monkeypatch.setattr(_nvrtc_core, "core", lambda device, is_double: small)
    monkeypatch.setattr(_nvrtc_core, "choice", lambda device: small)
    for _ in range(2):
        assert _cuda_solver.solver(0, 50, 5, False) == (small, "") and _cuda_solver.chooser(0) is small
        assert _cuda_solver.solver(1, 50, 5, False) == (core, "") and _cuda_solver.chooser(1) is core
    assert core.asked == [0, 1]
    why = _cuda_solver.solver(0, 100, 5, False)[1]
    assert f"the CUDA core does not run on cuda:0: words for {status} ({status})" in why


def test_a_core_that_could_not_be_asked_is_asked_again(monkeypatch):
    core = BuiltCore(2, 0)
    monkeypatch.setattr(_cuda_solver, "cuda_core", lambda: (core, ""))
    monkeypatch.setattr(_nvrtc_core, "core", lambda device, is_double: "no NVRTC")
    why = "the CUDA core does not run on cuda:0: words for 2 (2); no NVRTC"
    assert _cuda_solver.solver(0, 50, 5, False) == (None, why)
    for _ in range(2):
        assert _cuda_solver.solver(0, 50, 5, False) == (core, "")
    assert core.asked == [0, 0]


def test_a_core_of_older_sources_is_used_unasked(monkeypatch):
    core = object()
    monkeypatch.setattr(_cuda_solver, "cuda_core", lambda: (core, ""))
    assert _cuda_solver.solver(0, 50, 5, False) == (core, "") and _cuda_solver.chooser(0) is None
