"""Rules of BatchNorm and InstanceNorm, whose training-mode statistics couple the samples.

The gradient of the statistics reaches every row, so the exact gradient of k losses is not row-sparse: ``"exact"``
densifies. ``"subset"`` runs the kernel on the k rows with the statistics of n rows, as if the chosen rows were the
batch. A third way, statistics as constants, makes training diverge and is not offered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.registry import require, rule
from selbp.rows.wrap import wrap

aten = torch.ops.aten


@rule("native_batch_norm_backward")
def batch_norm(
    func: Any,
    gradient: Any,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    train: bool,
    eps: float,
    mask: list[bool],
) -> Any:
    """In eval mode, or batchnorm="subset"; InstanceNorm always."""
    require(isinstance(gradient, RowGradient) and not isinstance(x, RowGradient), "the gradient is dense")
    layout = gradient._layout
    if layout.dim == 1 and train:  # InstanceNorm folds the samples into the channels, so they are independent
        vectors = [None if v is None else layout.take(v, 0) for v in (weight, running_mean, running_var, mean, rstd)]
        out = func(gradient._data, layout.take(x), *vectors, train, eps, mask)
        places = (layout, layout.at(0), layout.at(0))
        return tuple(None if v is None else wrap(v, place) for v, place in zip(out, places, strict=True))
    require(layout.dim == 0, "the samples are not dim 0")
    subset = layout.rows.batchnorm == "subset" and layout.rows.n > 1  # with n = 1 the call may be an InstanceNorm
    require(not train or subset, "the batch statistics couple the samples")
    out = func(gradient._data, layout.take(x), weight, running_mean, running_var, mean, rstd, train, eps, mask)
    return None if out[0] is None else wrap(out[0], layout), out[1], out[2]


@rule("cudnn_batch_norm_backward", "miopen_batch_norm_backward")
def vendor_batch_norm(
    func: Any,
    x: Tensor,
    gradient: Any,
    weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    *reserve: Any,
) -> Any:
    """batchnorm="subset". The native kernel runs, because the vendor's reserve space belongs to all n rows."""
    args = (gradient, x, weight, running_mean, running_var, mean, rstd, True, eps, [True, True, True])
    return batch_norm(aten.native_batch_norm_backward.default, *args)
