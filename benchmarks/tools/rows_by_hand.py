"""A backward on chosen rows written by hand, beside ours: ``python -m benchmarks.tools.rows_by_hand``.

It calls torch's operators on copies of the chosen rows, with no wrapper, no dispatch and no rule: what no
implementation from these operators goes below. For chains of layers, which the MLP and the CNN are.
"""

from __future__ import annotations

import functools
import statistics
import time

import torch
from torch import Tensor, nn

import selbp
from benchmarks.bench_rows import forward_alone, full_step, ideal, on_rows
from selbp_study.row_models import TIMED

aten = torch.ops.aten
MODELS = ("MLP", "CNN")
ROUNDS = 40


def by_hand(model: nn.Sequential, x: Tensor, y: Tensor, chosen: Tensor) -> None:
    """Set the gradients of the mean cross-entropy of the ``chosen`` samples, from a forward of all of them."""
    inputs, k = [x], len(chosen)
    for layer in model:
        inputs.append(layer(inputs[-1]))
    copies: dict[int, Tensor] = {}  # by memory: ReLU's result is the next layer's input

    def rows(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in copies:
            copies[key] = tensor.detach().index_select(0, chosen)
        return copies[key].view(k, *tensor.shape[1:])

    with torch.no_grad():
        g = torch.softmax(inputs[-1][chosen], 1)
        g[torch.arange(k), y[chosen]] -= 1
        g /= k
        for place in reversed(range(len(model))):
            layer, given, output = model[place], inputs[place], inputs[place + 1]
            if isinstance(layer, nn.Linear):
                layer.weight.grad, layer.bias.grad = g.t() @ rows(given), g.sum(0)
                g = g @ layer.weight if place else g
            elif isinstance(layer, nn.Conv2d):
                one, wanted = [1, 1], [place > 0, True, True]
                g, layer.weight.grad, layer.bias.grad = aten.convolution_backward(
                    g, rows(given), layer.weight, [len(layer.weight)], one, one, one, False, [0, 0], 1, wanted
                )
            elif isinstance(layer, nn.ReLU):
                g = aten.threshold_backward(g, rows(output), 0)
            elif isinstance(layer, nn.MaxPool2d):
                where = output.grad_fn._saved_result1.index_select(0, chosen)
                g = aten.max_pool2d_with_indices_backward(g, rows(given), [2, 2], [2, 2], [0, 0], [1, 1], False, where)
            elif isinstance(layer, nn.AdaptiveAvgPool2d):
                g = aten._adaptive_avg_pool2d_backward(g, rows(given))
            else:
                g = g.view(k, *given.shape[1:])  # Flatten


def table(share: float = 0.25, rounds: int = ROUNDS) -> str:
    """Process-CPU ms by model, medians in turn: forward, full step, by hand, ours, and the ideal over the last two."""
    torch.set_num_threads(1)
    selbp.keep_freed_memory()
    lines = ["| model | forward | full step | by hand | rows | ideal / by hand | ideal / rows |", "|---|" + "--:|" * 6]
    for name in MODELS:
        task = TIMED[name]
        torch.manual_seed(0)
        model = task.build()
        x, y = task.batch(task.n)
        chosen = torch.randperm(task.n)[: max(1, round(share * task.n))].sort().values
        calls = {
            **{label: functools.partial(run, task, model, x, y, chosen) for label, run in CONTENDERS.items()},
            "by hand": functools.partial(by_hand, model, x, y, chosen),
        }
        times: dict[str, list[float]] = {label: [] for label in calls}
        for turn in range(rounds + 2):
            for label, call in calls.items():
                model.zero_grad(set_to_none=True)
                begin = time.process_time()
                call()
                if turn > 1:
                    times[label].append(1e3 * (time.process_time() - begin))
        ms = {label: statistics.median(found) for label, found in times.items()}
        best = ideal(share, ms)
        figures = [f"{ms[label]:.1f}" for label in ("forward alone", "full step", "by hand", "rows")]
        figures += [f"{best / ms['by hand']:.3f}", f"{best / ms['rows']:.3f}"]
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


CONTENDERS = {"forward alone": forward_alone, "full step": full_step, "rows": on_rows}

if __name__ == "__main__":
    print(table())
