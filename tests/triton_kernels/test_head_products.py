"""The products of the fused head's backward, with the signatures that each release of torch has on a GPU."""

import importlib.util

import pytest
import torch

pytest.importorskip("triton", minversion="3.4", reason="needs Triton 3.4 or newer")

A, B = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((4, 8), (8, 3)))


class Blas:
    """``torch.mm`` and ``torch.addmm`` of CUDA tensors in a release."""

    def __init__(self, version):
        self.version, self.calls = version, []

    def mm(self, a, b, **options):
        self.calls.append(("mm", a.dtype))
        if "out_dtype" in options and self.version < (2, 8):
            raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")
        return torch.empty(len(a), b.shape[1], dtype=options.get("out_dtype", a.dtype), device=a.device)

    def addmm(self, total, a, b, out_dtype, out):
        self.calls.append(("addmm", a.dtype))
        if self.version < (2, 8):
            raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")
        if self.version < (2, 10) and total.dtype != b.dtype:
            raise RuntimeError(f"self and mat2 must have the same dtype, but got {total.dtype} and {b.dtype}")
        return out


CALLS = {
    "2.6.0+cu124": ("mm", torch.float32),
    "2.7.1": ("mm", torch.float32),
    "2.8.0+cu128": ("mm", torch.bfloat16),
    "2.9.1": ("mm", torch.bfloat16),
    "2.10.0": ("addmm", torch.bfloat16),
    "2.13.0a0+git1234": ("addmm", torch.bfloat16),
}


@pytest.mark.parametrize("version", CALLS)
def test_sums_in_float32_are_asked_for_as_the_release_gives_them(version, monkeypatch):
    number = tuple(map(int, version.split(".")[:2]))
    blas, names = Blas(number), ["default", "out"] + (["dtype", "dtype_out"] if number >= (2, 8) else [])
    monkeypatch.setattr(torch, "__version__", version)
    for operator in (torch.ops.aten.mm, torch.ops.aten.addmm):
        monkeypatch.setattr(operator, "overloads", lambda: names)
    spec = importlib.util.find_spec("selbp.triton_kernels.linear_cross_entropy")
    head = importlib.util.module_from_spec(spec)  # one of its own: what it finds out it keeps
    spec.loader.exec_module(head)
    monkeypatch.setattr(torch, "mm", blas.mm)
    monkeypatch.setattr(torch, "addmm", blas.addmm)
    head.add_product(torch.empty(4, 3, device="meta"), A, B)
    assert blas.calls == [CALLS[version]]
    assert head.product(A, B).dtype == torch.float32
