"""The kernels that choose rows: on a GPU they choose as the CPU does from the same draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_parts.results import Results
from selbp.ops import choose_gradients
from selbp.ops.choose_rows import RULES, _choose_rows

F64 = torch.float64
Call = tuple[str, Callable[..., tuple[Tensor, ...]], tuple[object, ...]]


def calls(n: int, k: int, dtype: torch.dtype) -> Iterator[Call]:
    """Name, operator and arguments on the CPU; rows that are not valid, ties, and NaN among the scores."""
    generator = torch.Generator().manual_seed(n + k)
    normal, uniform = partial(torch.randn, generator=generator, dtype=F64), partial(torch.rand, generator=generator)
    score = normal(n).round(decimals=1)
    score[::7] = torch.nan
    valid, draws = uniform(n) > 0.1, uniform(n + 1, dtype=F64)
    single = dtype == torch.float32
    for rule in RULES:
        given = None if rule == "top" else draws
        weights = "mean" if rule == "top" else "unbiased"
        yield f"choose {rule}", _choose_rows, (score.to(dtype), valid, given, k, rule, weights, single)
    square, tau = normal(n).square().to(dtype), torch.ones((), dtype=F64)
    by_norm = (square, square.flip(0) + 1, valid, draws, tau, k, "unbiased", 0.9, 1.2, single)
    yield "choose by norm", choose_gradients.choose_by_norm, by_norm
    rows = normal(n, n // 2 + 2) + 0.3
    gram, mean = (rows @ rows.T).to(dtype), rows.mean(0)
    mixture, walk = normal(n, min(max(1, k // 2), n) - 1), uniform(2, n, dtype=F64)
    yield "choose balanced", choose_gradients.choose_balanced, (gram, valid, mixture, walk, k, True, single)
    inner, target_sq = (rows @ mean).to(dtype), mean.square().sum().to(dtype)
    diverse = (gram, inner, target_sq, valid, uniform(k, n, dtype=F64), k, "mean", single)
    yield "choose diverse", choose_gradients.choose_diverse, diverse


def check(results: Results, n: int, k: int, dtype: torch.dtype, device: str) -> None:
    """Every operator at one size: the CPU's rows, its weights to rounding, and the same bits twice."""
    for name, operator, arguments in calls(n, k, dtype):
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
        expected, found, again = operator(*arguments), operator(*moved), operator(*moved)
        rows = torch.equal(found[0].cpu(), expected[0])
        near = all(
            torch.allclose(a.cpu().double(), b.double(), rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=0)
            for a, b in zip(found[1:], expected[1:], strict=True)
        )
        same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        label = f"{name} {str(dtype).removeprefix('torch.')} n={n} k={k}"
        results.add(label, rows and near and same, detail=f"rows {rows}, weights {near}, twice {same}")


def run(results: Results, device: str, tiny: bool) -> None:
    """Sizes within a warp, across a block's, and the most that one block takes."""
    sizes = [(17, 5)] if tiny else [(1, 1), (33, 33), (128, 32), (1000, 250), (4096, 64)]
    for n, k in sizes:
        for dtype in (torch.float32, F64):
            results.row(f"choices of {k} of {n} {dtype}", partial(check, results, n, k, dtype, device))
