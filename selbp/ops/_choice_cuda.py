"""The kernels of csrc/selection as the operators call them: a whole choice of rows in one launch of one block.

The structures are those of csrc/selection/selection.hpp. Each function returns None where the kernel cannot run (no
core and no NVRTC, or more rows than a block sorts in its shared memory): the reference chooses then.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selbp.ops._cuda_solver import chooser

MOST_ROWS, MOST_THREADS, WARP = 4096, 512, 32
ROOM = (MOST_THREADS + 1) * 8 + 4 * WARP * 8  # csrc/selection/block.cuh: Block::kRoom
RULES = ("top", "odds", "rank", "norm", "percentile")
WEIGHTS = ("mean", "batch", "unbiased")
_REAL = (torch.float32, torch.float64)

Choice = tuple[Tensor, Tensor]  # indices (k,) and weights (k,), the latter float32 where asked for, else float64


def _structure(name: str, pointers: str, doubles: str, ints: str) -> type[ctypes.Structure]:
    kinds = ((pointers, ctypes.c_void_p), (doubles, ctypes.c_double), (ints, ctypes.c_int32))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Choose = _structure(
    "Choose", "score second valid draws before after odds indices weights", "momentum threshold power least",
    "n k length single_score single_weights rule mode",
)  # fmt: skip
Balanced = _structure(
    "Balanced", "gram valid mixture draws indices weights sketch matrix", "", "n k p single_gram single_weights by_norm"
)
Diverse = _structure(
    "Diverse", "gram inner target_sq valid draws indices weights scratch", "noise", "n k single single_weights mode"
)
KERNELS: dict[type, int] = {Choose: 0, Balanced: 1, Diverse: 2}  # selection/cuda.hpp


def choose(
    score: Tensor,  # (n,) float32 or float64
    valid: Tensor,  # (n,) bool
    draws: Tensor | None,  # (n + 1,)
    k: int,
    rule: str,
    weights: str,
    single: bool,
    *,
    second: Tensor | None = None,  # (n,) of the type of score
    before: Tensor | None = None,  # () float64, with rule "norm"; (length,) float64, with rule "percentile"
    momentum: float = 0.0,
    threshold: float | None = None,
    power: float = 0.0,
    least: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Indices, weights, and what becomes of ``before``: the running mean of tau, or the last losses."""
    n, length = len(score), len(before) if rule == "percentile" and before is not None else 0
    if length > MOST_ROWS:
        return None
    launch = _launcher(n, k, ROOM + _columns(max(n, length)), score, second)
    if launch is None:
        return None
    indices, found = _outputs(score, k, single)
    after = None if before is None else torch.empty(before.shape, dtype=torch.float64, device=before.device)
    odds = score.new_empty(n, dtype=torch.float64) if length else None
    launch(
        Choose, max(n, length), score=score, second=second, valid=valid, draws=draws, before=before, after=after,
        odds=odds, indices=indices, weights=found, momentum=momentum,
        threshold=-1.0 if threshold is None else threshold, power=power, least=least, n=n, k=k,
        length=length, single_score=score.dtype == torch.float32, single_weights=single, rule=RULES.index(rule),
        mode=WEIGHTS.index("batch" if rule == "top" and weights == "unbiased" else weights),
    )  # fmt: skip
    return indices, found, after


def balanced(
    gram: Tensor,  # (n, n)
    valid: Tensor,  # (n,)
    mixture: Tensor,  # (n, p - 1) float64
    draws: Tensor,  # (2, n) float64
    k: int,
    by_norm: bool,
    single: bool,
) -> Choice | None:
    """Indices and weights of the cube method's draw."""
    n, p = len(gram), mixture.shape[1] + 1
    width = p + 2
    columns = _columns(n)
    launch = _launcher(n, k, ROOM + columns + 16 * n + 24 * width + 4 * n + 8 * width, gram)
    if launch is None:
        return None
    indices, found = _outputs(gram, k, single)
    fits = (p + 1) * (p + 2) <= 2 * _padded(n)  # the matrix, into the columns of the sort
    launch(
        Balanced, max(n, width), gram=gram, valid=valid, mixture=mixture, draws=draws, indices=indices, weights=found,
        sketch=draws.new_empty(n, p), matrix=None if fits else draws.new_empty(p + 1, p + 2), n=n, k=k, p=p,
        single_gram=gram.dtype == torch.float32, single_weights=single, by_norm=by_norm,
    )  # fmt: skip
    return indices, found


def diverse(
    gram: Tensor,  # (n, n)
    inner: Tensor,  # (n,)
    target_sq: Tensor,  # ()
    valid: Tensor,  # (n,)
    draws: Tensor,  # (k, n) float64
    k: int,
    weights: str,
    noise: float,
    single: bool,
) -> Choice | None:
    """Indices and weights of a randomised matching pursuit."""
    n = len(gram)
    launch = _launcher(n, k, ROOM, gram)
    if launch is None:
        return None
    indices, found = _outputs(gram, k, single)
    launch(
        Diverse, n, gram=gram, inner=inner, target_sq=target_sq, valid=valid, draws=draws, indices=indices,
        weights=found, scratch=draws.new_empty(k + 4, n), noise=noise, n=n, k=k,
        single=gram.dtype == torch.float32, single_weights=single, mode=WEIGHTS.index(weights),
    )  # fmt: skip
    return indices, found


def _padded(n: int) -> int:
    """The power of two that a sort of n rows fills."""
    return 1 << (n - 1).bit_length()


def _columns(n: int) -> int:
    """Bytes of csrc/selection/block.cuh's Columns."""
    return 16 * _padded(n) + 4 * max(_padded(n), 2)


def _outputs(like: Tensor, k: int, single: bool) -> Choice:
    return like.new_empty(k, dtype=torch.int64), like.new_empty(k, dtype=torch.float32 if single else torch.float64)


def _launcher(n: int, k: int, shared: int, *tensors: Tensor | None) -> Callable[..., None] | None:
    """What launches a kernel on the tensors' device, or None where it cannot run."""
    first = next(tensor for tensor in tensors if tensor is not None)
    if not 0 < n <= MOST_ROWS or k <= 0 or any(t is not None and t.dtype not in _REAL for t in tensors):
        return None
    device = first.device.index or 0
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 48 << 10)
    core = chooser(device) if shared <= limit else None
    if core is None:
        return None

    def launch(structure: type, work: int, **fields: Any) -> None:
        kept = {name: x.contiguous() if isinstance(x, Tensor) else x for name, x in fields.items()}
        problem = structure(**{name: x.data_ptr() if isinstance(x, Tensor) else x for name, x in kept.items()})
        threads = min(MOST_THREADS, max(2 * WARP, -(-work // WARP) * WARP))
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            core.launch_choice(
                KERNELS[structure], ctypes.addressof(problem), ctypes.sizeof(problem), threads, shared, device, stream
            )

    return launch
