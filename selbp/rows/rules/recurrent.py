"""The rule of oneDNN's recurrent layer: LSTM in float32 on a CPU.

The forward saves a workspace from which rows cannot be taken. The layer's forward therefore runs again on the k rows,
which costs k / n of the forward on n. The other recurrent layers run as products and need no rule of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from selbp.rows.gradient import RowGradient
from selbp.rows.registry import require, rule
from selbp.rows.wrap import wrap

aten = torch.ops.aten


@rule("mkldnn_rnn_layer_backward")
def rnn_layer(func: Any, *args: Any) -> Any:
    """No packed sequences. The layer's forward runs again on the k rows."""
    x, *weights, state, cell, _, _, _ = args[:10]
    gradients = args[10:13]  # of the output (T, n, h), of the last state and of the last cell (n, h)
    reverse, mode, hidden, layers, biases, train, bidirectional, sizes, batch_first, _ = args[13:]
    gradient = next(g for g in gradients if isinstance(g, RowGradient))
    samples = gradient._rows.layout(0)
    steps = samples.at(1)
    for gradient, layout in zip(gradients, (steps, samples, samples), strict=True):
        fits = gradient is None or (isinstance(gradient, RowGradient) and gradient._layout is layout)
        require(fits, "a gradient is dense, or its samples are elsewhere")
    require(not sizes, "packed sequences")
    x, state, cell = steps.take(x), samples.take(state), samples.take(cell)
    again = (x, *weights, state, cell, reverse, sizes, mode, hidden, layers, biases, bidirectional, batch_first, train)
    with (
        torch.enable_grad(),
        torch._C._AutoDispatchBelowAutograd(),
    ):  # the layer keeps its workspace in this mode only
        output, last_state, last_cell, workspace = aten.mkldnn_rnn_layer.default(*again)
    rows = [None if g is None else g._data for g in gradients]
    dx, dw0, dw1, dw2, dw3, dstate, dcell = func(
        x, *weights, state, cell, output, last_state, last_cell, *rows, *args[13:-1], workspace
    )
    return wrap(dx, steps), dw0, dw1, dw2, dw3, wrap(dstate, samples), wrap(dcell, samples)
