"""NVRTC's kernels launched through the driver's interface, which emulated threads stand in for: the CPU's bits."""

import ctypes
import types

import pytest
import torch
from support.compiled import ROOT, compile_all, link
from support.emulation import COMMON, HERE, machine_flags

from selbp import ops
from selbp.ops import _nvrtc, _nvrtc_core
from selbp.reference.sampling import fill_spare

NAMES = {"float": "If", "double": "Id"}


@pytest.fixture(scope="module")
def driver():
    shim, csrc = HERE / "shim", ROOT / "csrc"
    kernels = [*COMMON, *machine_flags(), "-fPIC", "-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE"]
    units = [
        (HERE / "fake_driver.cpp", kernels, [shim, csrc]),
        (shim / "scheduler.cpp", [*COMMON, "-fPIC"], [shim]),
    ]
    return ctypes.CDLL(str(link("fake_driver", compile_all(units), ("-shared",))))


@pytest.fixture
def core(driver, monkeypatch):
    """``core(shared bytes of a block, is_double)``."""

    def compiled(compiler, element, target):
        assert target == "sm_90"
        names = {kernel: f"match_blocks{NAMES[element]}Lb{kernel == 'shared':d}E" for kernel in _nvrtc.KERNELS}
        return _nvrtc.Code(b"image", names, "")

    def make(shared, is_double):
        properties = types.SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=shared)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return _nvrtc_core.Core(0, is_double)

    stub = types.SimpleNamespace(version="13.0", target=lambda capability: f"sm_{capability}")
    monkeypatch.setattr(_nvrtc, "Compiler", lambda major: stub)
    monkeypatch.setattr(_nvrtc, "compiled", compiled)
    monkeypatch.setattr(_nvrtc_core, "driver", lambda: driver)
    return make


def problem(n, batch, dtype, masked):
    generator = torch.Generator().manual_seed(n)
    rows = torch.randn(batch, n, n // 2 + 2, generator=generator, dtype=torch.float64) + 0.3
    target = rows.mean(1) + 0.2 * torch.randn(batch, n // 2 + 2, generator=generator, dtype=torch.float64)
    found = [rows @ rows.mT, (rows @ target[..., None])[..., 0], target.square().sum(1)]
    valid = torch.rand(batch, n, generator=generator) > 0.2 if masked else None
    return [x.to(dtype) for x in found], valid


def empty_outputs(batch, k, dtype):
    shapes = ((batch, k), torch.int64), ((batch, k), dtype), ((batch,), torch.int32), ((batch,), dtype)
    return [torch.empty(shape, dtype=kind) for shape, kind in (*shapes, ((batch,), torch.uint8))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["shared", "global"])
@pytest.mark.parametrize(("n", "k", "rule"), [(1, 1, 0), (33, 40, 0), (96, 24, 1), (70, 70, 2)], ids=str)
def test_the_launch_gives_the_bits_of_the_cpu(core, where, dtype, n, k, rule):
    is_double, batch = dtype == torch.float64, 3
    size = _nvrtc_core.sizes(n, k, is_double)
    made = core(size.arrays + (size.tableau if where == "shared" else 0), is_double)
    for masked, fill in ((False, False), (True, False), (True, True)):
        inputs, valid = problem(n, batch, dtype, masked)
        outputs = empty_outputs(batch, k, dtype)
        assert made.fits(n, k)
        bytes_wanted = made.match_workspace(batch, is_double, n, k, 0)
        assert (bytes_wanted == 0) == (where == "shared")
        workspace = torch.empty(bytes_wanted + 256, dtype=torch.uint8)
        start = (workspace.data_ptr() + 63) // 64 * 64
        mask = 0 if valid is None else valid.data_ptr()
        addresses = [*(x.data_ptr() for x in inputs), mask, *(x.data_ptr() for x in outputs)]
        made.match(addresses, is_double, batch, n, k, rule, True, 1e-3, 0.05, fill, start, 0, 77)
        names = ("ols", "normalized", "raw")
        wanted = ops.match(*inputs, k, rule=names[rule], ridge=1e-3, tolerance=0.05, valid=valid)
        if fill:
            real = wanted.indices >= 0
            spare = [fill_spare(*of_one)[0] for of_one in zip(wanted.indices, real, valid, strict=True)]
            wanted = wanted._replace(indices=torch.stack(spare))
        for name, ours, theirs in zip(wanted._fields, outputs, wanted, strict=True):
            assert torch.equal(ours, theirs), name


def test_a_problem_whose_arrays_do_not_fit_is_not_taken(core):
    size = _nvrtc_core.sizes(64, 16, False)
    assert core(size.arrays, False).fits(64, 16) and not core(size.arrays - 1, False).fits(64, 16)


def test_an_error_of_the_driver_is_said(core):
    made = core(1 << 20, False)
    with pytest.raises(RuntimeError, match=r"CUDA driver: a launch that the kernels do not expect \(1\)"):
        made.match([0] * 9, False, 1, 32, 4, 0, True, 0.0, 0.0, False, 0, 0, 78)
