"""The operators that a step makes of a minibatch: on a GPU they give what the CPU's give from the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from gpu_parts.results import Results
from selbp.ops import minibatch
from selbp.ops.choose_gradients import choose_by_percentile
from selbp.ops.match_gradients import _match_gradients
from selbp.ops.score_minibatch import _score_minibatch

Call = tuple[str, Callable[..., object], tuple[object, ...]]
OPTIONS = (
    ("plain", (False, 0.0, 0.0)),
    ("class weights", (True, 0.0, 0.0)),
    ("smoothing", (False, 0.1, 0.0)),
    ("soft cap", (False, 0.0, 5.0)),
    ("everything", (True, 0.2, 7.0)),
)


def scored(n: int, n_classes: int, d: int, dtype: torch.dtype) -> Iterator[Call]:
    """A minibatch at once, with every option; rows that are ignored, and rows with NaN."""
    generator = torch.Generator().manual_seed(n + n_classes)
    logits, features = (3 * torch.randn(n, m, generator=generator).to(dtype) for m in (n_classes, d))
    target = torch.randint(n_classes, (n,), generator=generator)
    target[1::7] = -100
    logits[3::11, 0], features[5::13, 0] = torch.nan, torch.inf
    weight = torch.rand(n_classes, generator=generator)
    for name, (weighted, smoothing, cap) in OPTIONS:
        for factors in ("none", "residual", "both"):
            arguments = (target, features, weight if weighted else None, -100, smoothing, cap, True, factors)
            yield f"minibatch {name} factors={factors}", _score_minibatch, (logits, *arguments)
    live = torch.rand(n, generator=generator) > 0.1
    yield "hits", minibatch.count_hits, (logits, target, live, -100)
    yield "finite rows", minibatch.finite_rows, (features,)
    yield "unscored", minibatch.unscored, (target, live, weight, -100, False)
    losses, weights = torch.rand(n, generator=generator), torch.rand(n, generator=generator) * live
    yield "weighted loss", minibatch.weighted_loss, (losses.masked_fill(~live, torch.nan), torch.tensor(1.5), weights)


def chosen(n: int, n_classes: int, d: int, k: int) -> Iterator[Call]:
    """Rows by the loss's percentile, and a match from the factors, with and without rows to look for."""
    generator = torch.Generator().manual_seed(n + k)
    uniform, normal = partial(torch.rand, generator=generator), partial(torch.randn, generator=generator)
    valid, draws = uniform(n) > 0.1, uniform(n + 1, dtype=torch.float64)
    history = normal(2 * n, dtype=torch.float64)
    history[: n // 2] = torch.nan
    percentile = (normal(n), valid, history, draws, k, "unbiased", 3.0, 0.01, True)
    yield "choose by percentile", choose_by_percentile, percentile
    residual, features = normal(n, n_classes), normal(n, d) + 0.3
    residual[~valid] = 0.0
    for finite in (True, False):
        if not finite:
            features[~valid] = torch.nan
        arguments = (residual.clone(), features.clone(), valid, True, k, "ols", 1e-3, True, finite)
        yield f"match gradients finite={finite}", _match_gradients, arguments


def check(results: Results, calls: Callable[..., Iterator[Call]], size: tuple[object, ...], device: str) -> None:
    """Every operator at one size: near the CPU's numbers, equal where they are whole, and the same bits twice."""
    for name, operator, arguments in calls(*size):
        moved = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
        expected, found, again = (_tensors(operator(*given)) for given in (arguments, moved, moved))
        near = all(_near(a.cpu(), b) for a, b in zip(found, expected, strict=True))
        same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, again, strict=True))
        results.add(f"{name} {size}", near and same, detail=f"near {near}, twice {same}")


def _tensors(found: object) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)  # type: ignore[call-overload]


def _near(ours: Tensor, expected: Tensor) -> bool:
    """Whole numbers and flags are equal; others differ by what rounding in another order leaves of their greatest."""
    if not expected.is_floating_point():
        return torch.equal(ours, expected)
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if finite.any() else 0.0
    return torch.equal(ours.isfinite(), finite) and torch.allclose(ours[finite], expected[finite], 1e-5, 2e-6 * scale)


def run(results: Results, device: str, tiny: bool) -> None:
    """Few classes and the most that a program holds, one row and more rows than a program."""
    sizes = [(17, 5, 8)] if tiny else [(1, 1, 1), (128, 10, 64), (300, 1003, 257), (4096, 4096, 64), (9, 5000, 24)]
    for size in sizes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            results.row(f"minibatch {size} {dtype}", partial(check, results, scored, (*size, dtype), device))
    for size in [(17, 3, 8, 5)] if tiny else [(33, 3, 8, 8), (128, 10, 64, 16), (1024, 100, 512, 16)]:
        results.row(f"chosen {size}", partial(check, results, chosen, size, device))
