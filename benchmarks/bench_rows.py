"""A backward through chosen rows against the full step, a second forward on the rows, and the model's own bound.

The bound is T_full / (T_forward + f T_backward): a backward that costs exactly its share. Process-CPU time is the clock
to trust on a shared machine (``python -m benchmarks rows --clock process``); the optimizer is not in it. The process
keeps the memory that it frees, for all contenders alike: see ``selbp.keep_freed_memory``.

``python -m benchmarks.bench_rows python`` lists what an operator on a row gradient costs beside its kernel and copies,
``... memory`` the peak memory of a step by strategy, each in a process of its own, ``... auto [plain] [share ...]
[model ...]`` what ``backward="auto"`` chooses beside the times of both strategies.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from benchmarks.harness import Case, suite
from benchmarks.row_memory import live_peak, resident_peak
from benchmarks.row_models import TIMED, Task, classification
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import RowSet
from selbp.rows.wrap import wrap
from selbp_study.models import SmallCNN, Transformer

SHARES = (0.25,)  # `throughput` times whole steps at others


def _inputs(task: Task, share: float, device: torch.device) -> tuple[Any, ...]:
    model = task.build().to(device)
    x, y = (t.to(device) for t in task.batch(task.n))
    chosen = torch.randperm(task.n, device=device)[: max(1, round(share * task.n))]
    return model, x, y, chosen


def finish(model: nn.Module, losses: Tensor) -> None:
    """The backward, without gradients of a step before."""
    model.zero_grad(set_to_none=True)
    losses.mean().backward()


def on_rows(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    """A step whose backward runs through the chosen rows."""
    finish(model, selbp.select(task.losses(model(x), y), chosen))


def _recompute(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    with torch.no_grad():
        task.losses(model(x), y)
    finish(model, task.losses(model(x[chosen]), y[chosen]))


def _full(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    finish(model, task.losses(model(x), y))


def _indexed(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    finish(model, task.losses(model(x), y)[chosen])


def _forward(task: Task, model: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    return task.losses(model(x), y)


def _case(name: str, share: float) -> Case:
    task = TIMED[name]
    contenders = {
        "ours": on_rows,
        "second forward on the rows": _recompute,
        "full step": _full,
        "losses[indices], plain autograd": _indexed,
        "forward alone (for the bound)": _forward,
    }
    return Case(
        f"rows {name} n={task.n} keep={share}",
        functools.partial(_inputs, task, share),
        {label: functools.partial(run, task) for label, run in contenders.items()},
        limits={"second forward on the rows": 1.0},
        quick=name == "MLP" and share == 0.25,
    )


CASES = [_case(name, share) for name in TIMED for share in SHARES]
test_rows = suite(CASES)


# ---------------------------------------------------------------------------------- Python per backward operator

aten = torch.ops.aten
REPEATS, CALLS = 60, 100  # bursts short enough that some are not interrupted


def _microseconds(call: Callable[[], object]) -> float:
    call()
    return min(timeit.repeat(call, number=CALLS, repeat=REPEATS)) / CALLS * 1e6


class _Swap(torch.Tensor):
    """Does nothing but hand the stored tensor to the kernel: what any ``__torch_dispatch__`` costs."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    _data: Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*[value._data if type(value) is _Swap else value for value in args])


def _swapped(data: Tensor) -> Tensor:
    out = torch.Tensor._make_wrapper_subclass(_Swap, data.shape, data.stride(), dtype=data.dtype)
    out._data = data
    return out


def _operators(rows: RowSet) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Calls as autograd makes them, on tensors so small that the kernel costs next to nothing."""
    n, k, d = rows.n, rows.k, 16
    layout = rows.layout(0)
    gradient, saved, weight = wrap(torch.randn(k, d), layout), torch.randn(n, d), torch.randn(d, d)
    image, filters = torch.randn(n, 3, 2, 2), torch.randn(4, 3, 1, 1)
    pixels, mean, rstd, scale = (
        wrap(torch.randn(k, 4, 2, 2), layout), torch.randn(n, 1), torch.rand(n, 1), torch.ones(d)
    )  # fmt: skip
    convolution = ([4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True])
    return {
        "t": (aten.t.default, (gradient,)),
        "transpose": (aten.transpose.int, (gradient, 0, 1)),
        "view": (aten.view.default, (gradient, [n, 4, d // 4])),
        "neg": (aten.neg.default, (gradient,)),
        "add, two gradients": (aten.add.Tensor, (gradient, gradient)),
        "sum over the samples": (aten.sum.dim_IntList, (gradient, [0], True)),
        "mul": (aten.mul.Tensor, (gradient, saved)),
        "threshold_backward": (aten.threshold_backward.default, (gradient, saved, 0)),
        "gelu_backward": (aten.gelu_backward.default, (gradient, saved)),
        "mm, samples outside": (aten.mm.default, (gradient, weight)),
        "mm, samples contracted": (aten.mm.default, (gradient.t(), saved)),
        "native_layer_norm_backward": (
            aten.native_layer_norm_backward.default,
            (gradient, saved, [d], mean, rstd, scale, scale, [True, True, True]),
        ),
        "convolution_backward": (aten.convolution_backward.default, (pixels, image, filters, *convolution)),
    }


def python_per_operator() -> str:
    """A table, microseconds with warm caches: the whole call, its kernel, dispatch, and what is ours; the copies."""
    torch.set_num_threads(1)
    rows = RowSet(torch.tensor([1, 4]), 8)
    lines = ["| operator | on rows | kernel | any dispatch | ours | copies |", "|---|--:|--:|--:|--:|--:|"]
    with torch.no_grad():
        for name, (func, args) in _operators(rows).items():
            gradient = next(value for value in args if type(value) is RowGradient)
            layout = gradient._layout

            def cut(value: Any, layout: Any = layout) -> Any:
                if type(value) is RowGradient:
                    return value._data
                of_samples = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == rows.n
                return layout.take(value, 0) if of_samples else value

            plain = [cut(value).contiguous() if isinstance(value, Tensor) else value for value in args]
            bare = [_swapped(cut(value)) if type(value) is RowGradient else cut(value) for value in args]
            taken = [v for v in args if isinstance(v, Tensor) and cut(v) is not v and type(v) is not RowGradient]
            if func is aten.view.default:
                plain[1] = bare[1] = [rows.k, *args[1][1:]]

            def forget_and_take(taken: Any = taken, layout: Any = layout) -> None:
                rows.slices.clear()
                for value in taken:
                    layout.take(value, 0)

            rows.slices.clear()
            func(*args)
            remembered = {place[0] for place in rows.slices._copies}  # what else is copied is so in every call
            again = [value for value in taken if value.untyped_storage()._cdata not in remembered]

            def copy_again(again: Any = again, layout: Any = layout) -> None:
                for value in again:
                    layout.take_once(value)

            kernel = _microseconds(functools.partial(func, *plain))
            dispatch = max(0.0, _microseconds(functools.partial(func, *bare)) - kernel)
            copies = _microseconds(forget_and_take) if taken else 0.0
            whole = _microseconds(functools.partial(func, *args))
            ours = whole - kernel - dispatch - (_microseconds(copy_again) if again else 0.0)
            numbers = (whole, kernel, dispatch, ours, copies)
            lines.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------- peak memory


class _Kept(nn.Module):
    """A block under ``selbp.checkpoint``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return selbp.checkpoint(self.block, x)


STRATEGIES = {"full": _full, "recompute": _recompute, "rows": on_rows, "rows, checkpoint": on_rows}


def peaks(name: str, strategy: str, share: float, n: int | None = None) -> tuple[int, int]:
    """Bytes of tensors alive at once in a step, and by which the resident set of this process rises in three steps."""
    task = TIMED[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = task.build()
    if "checkpoint" in strategy:
        model.blocks = nn.Sequential(*map(_Kept, model.blocks))
    x, y = task.batch(n or task.n)
    call = functools.partial(STRATEGIES[strategy], task, model)
    call(*task.batch(8), torch.arange(2))  # loads the code, which is not a step's memory
    step = functools.partial(call, x, y, torch.randperm(len(x))[: max(1, round(share * len(x)))])
    resident = resident_peak(step)
    model.zero_grad(set_to_none=True)
    return live_peak(step), resident


def memory_table(share: float = 0.25) -> str:
    """Peak MiB above the model's own, alive / resident, by strategy, each in a process of its own."""
    lines = ["| model | " + " | ".join(STRATEGIES) + " |", "|---|" + "--:|" * len(STRATEGIES)]
    for name in TIMED:
        cells = []
        for strategy in STRATEGIES:
            if "checkpoint" in strategy and name not in ("ViT", "GPT"):
                cells.append("-")
                continue
            command = [sys.executable, "-m", "benchmarks.bench_rows", "peak", name, strategy, str(share)]
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
            cells.append(" / ".join(f"{int(size) / 2**20:.0f}" for size in found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- what "auto" chooses


def _demo_images(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 1, 28, 28), torch.randint(10, (n,))


def _characters(n: int) -> tuple[Tensor, Tensor]:
    return torch.randint(63, (n, 32)), torch.randint(63, (n, 32))


def _per_text(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)


STUDIED = {
    "demo": Task(lambda: SmallCNN((28, 28), 10), _demo_images, classification, 128),
    "text": Task(lambda: Transformer((32,), 63), _characters, _per_text, 64),
}


def auto_table(words: list[str], seconds: float = 4.0) -> str:
    """Process-CPU milliseconds (20th percentile, interleaved) of both strategies, and which one auto takes.

    ``bound / rows`` is the share of the model's bound that is reached: a backward that costs f of all n rows'. The next
    column takes the kernels as they are, by the ordinary backward of a batch of k: what is missing there is ours.

    Args:
        words: ``plain`` leaves the allocator as it is; numbers are shares (0.25), the rest models (all).
        seconds: for each model and share.
    """
    torch.set_num_threads(1)
    kept = selbp.keep_freed_memory() if "plain" not in words else False
    lines = [
        f"freed memory is {'kept' if kept else 'returned (plain glibc)'}", "",
        "| model | keep | full | rows | recompute | bound / rows | with these kernels | rows / recompute "
        "| auto | auto / better |", "|---|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]  # fmt: skip
    tasks = {**TIMED, **STUDIED}
    for name in [word for word in words if word in tasks] or list(tasks):
        task = tasks[name]
        torch.manual_seed(0)
        model = task.build()
        x, y = task.batch(task.n)
        for share in [float(word) for word in words if word[0] in "0."] or SHARES:
            chosen = torch.randperm(task.n)[: max(1, round(share * task.n))]
            few = (x[chosen], y[chosen])
            calls = [
                functools.partial(run, task, model, *batch, chosen)
                for run, batch in (
                    (_full, (x, y)), (_forward, (x, y)), (on_rows, (x, y)), (_recompute, (x, y)), (_full, few),
                    (_forward, few),
                )
            ]  # fmt: skip
            full, forward, rows, again, full_k, forward_k = interleaved(calls, seconds)
            picked = selbp.diagnose(model, (x, y), share, loss=task.losses).recommendation
            bound, reachable = forward + share * (full - forward), forward + full_k - forward_k
            best = (rows if picked == "rows" else again) / min(rows, again)
            lines.append(
                f"| {name} | {share} | {full:.1f} | {rows:.1f} | {again:.1f} | {bound / rows:.3f} "
                f"| {reachable / rows:.3f} | {rows / again:.3f} | {picked} | {best:.3f} |"
            )
    return "\n".join(lines)


def interleaved(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Process-CPU milliseconds of each call, the 20th percentile."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    for call in calls * 3:
        call()
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, found in zip(calls, times, strict=True):
            begin = time.process_time()
            call()
            found.append(1e3 * (time.process_time() - begin))
    return [statistics.quantiles(found, n=5)[0] for found in times]


if __name__ == "__main__":
    what, *rest = sys.argv[1:] or ["python"]
    if what == "peak":
        print(*peaks(rest[0], rest[1], float(rest[2])))
    else:
        print({"python": python_per_operator, "memory": memory_table, "auto": lambda: auto_table(rest)}[what]())
