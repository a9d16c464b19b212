"""The fastest matrix product that this torch offers on this CPU; the operators' GEMMs go through here.

``torch.mm`` in float32 is MKL's, which reaches half of the peak on AMD processors. oneDNN's reaches all of it there,
but torch exposes it only as the private operator ``mkldnn::_linear_pointwise`` (what TorchInductor emits for a linear
layer). So the first product of a dtype times the two once (a few milliseconds), checks that they agree, and keeps the
private one only where it is clearly ahead; where it is missing, refuses, disagrees or is switched off
(``torch.backends.mkldnn.flags(enabled=False)``), ``torch.mm`` does the work.

``SELBP_GEMM=mm`` or ``onednn`` settles the choice without timing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

_PROBED = (torch.float32, torch.bfloat16)
_CLEARLY_AHEAD = 1.25  # so that noise does not decide, and two runs on one machine choose alike
_SMALL = 1 << 20  # multiply-adds below which the private operator's 15 us of overhead cancel its lead

_choice: dict[torch.dtype, bool] = {}  # dtype -> the private operator is used


def linear(
    x: Tensor,  # (m, k)
    weight: Tensor,  # (n, k)
    bias: Tensor | None = None,  # (n,)
) -> Tensor:
    """``x @ weight.T (+ bias)``, (m, n) in the operands' dtype, for CPU tensors of one dtype with any strides."""
    m, k = x.shape
    work = m * k * len(weight)
    if work >= _SMALL and m >= 4 and uses_onednn(x.dtype):
        return _onednn(x, weight, bias)
    return _torch_mm(x, weight, bias)


def uses_onednn(dtype: torch.dtype) -> bool:
    """Whether large products of ``dtype`` go to oneDNN's private operator; the first call per dtype probes."""
    if dtype not in _PROBED or not torch._C._get_mkldnn_enabled():
        return False
    chosen = _choice.get(dtype)
    if chosen is None:
        chosen = _choice[dtype] = _choose(dtype, os.environ.get("SELBP_GEMM", "auto"))
    return chosen


def _torch_mm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _choose(dtype: torch.dtype, wanted: str) -> bool:
    if wanted not in ("auto", "mm", "onednn"):
        raise ValueError(f"SELBP_GEMM must be auto, mm or onednn, got {wanted!r}")
    if wanted == "mm" or not _agree(dtype):
        return False
    return wanted == "onednn" or _measured_lead(dtype) > _CLEARLY_AHEAD


def _operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Small integers, whose products every correct GEMM returns exactly, in the layouts that the operators use."""
    values = torch.arange(256 * 256, dtype=torch.float64, device="cpu").reshape(256, 256)
    x = ((values * 7 + values.t()) % 3 - 1).to(dtype)
    return x, ((values * 5 + 2) % 3 - 1).to(dtype), (values[0] % 5).to(dtype)


def _agree(dtype: torch.dtype) -> bool:
    """The private operator exists, takes this dtype and returns what ``torch.mm`` returns."""
    x, weight, bias = _operands(dtype)
    try:
        return all(
            torch.equal(_onednn(a, b, c), _torch_mm(a, b, c))
            for a, b, c in ((x, weight, None), (x, weight, bias), (x[:200].t(), weight[:200].t(), None))
        )
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):  # absent, or without this dtype here
        return False


def _measured_lead(dtype: torch.dtype) -> float:
    """Time of ``torch.mm`` over time of the private operator, each the best of five interleaved products."""
    x, weight, _ = _operands(dtype)

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        product(x, weight)
        return time.perf_counter() - start

    pairs = [(seconds(_torch_mm), seconds(_onednn)) for _ in range(5)]
    return min(a for a, _ in pairs) / min(b for _, b in pairs)
