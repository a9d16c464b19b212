"""What an operator on a row gradient costs beside its kernel and its copies.

``python -m benchmarks.tools.rows_dispatch`` prints the table.
Microseconds with warm caches: the whole call, its kernel, what any dispatch costs, what is ours, the copies.
"""

from __future__ import annotations

import functools
import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.layout import RowSet
from selbp.rows.wrap import wrap

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
        wrap(torch.randn(k, 4, 2, 2), layout),
        torch.randn(n, 1),
        torch.rand(n, 1),
        torch.ones(d),
    )
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


def table() -> str:
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
                    layout.once(value)

            kernel = _microseconds(functools.partial(func, *plain))
            dispatch = max(0.0, _microseconds(functools.partial(func, *bare)) - kernel)
            copies = _microseconds(forget_and_take) if taken else 0.0
            whole = _microseconds(functools.partial(func, *args))
            ours = whole - kernel - dispatch - (_microseconds(copy_again) if again else 0.0)
            numbers = (whole, kernel, dispatch, ours, copies)
            lines.append(f"| {name} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
