"""``proxy="sketch"``: the head gradients of sequences in a few thousand random directions.

The exact inner products of g_i = sum_t r_it (x) [h_it, 1] cost (n T + n^2) C d multiplications or (n T)^2 (C + d), for
a language model about as much as the backward that the choice saves. S_i = sum_t (P' r_it) (x) (Q' [h_it, 1]) has
unbiased inner products, see :mod:`selbp.ops.sketch`, for n T C p.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selbp import ops
from selbp.training.linear_proxies import HeadFactors

IGNORED = -100
TILE_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of residuals: a CPU's stay in its cache
LEAST = 64  # positions in a tile, so that reading P does not take most of the time
DIMENSIONS = (64, 64)  # p and q: the variance of <S_i, S_j> is at most .064 |g_i|^2 |g_j|^2


class Sketcher:
    """Projects by matrices that are drawn once, from a seed of their own: the same in every step and process."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, residual: Callable[[slice], Tensor], classes: int, features: Tensor, bias: bool) -> Tensor:
        """(n, p q) sketches of features (n, T, d) and the residuals (t, C) that ``residual`` gives of some positions.

        Few at a time: all residuals are as large as the logits.
        """
        n, length, width = features.shape
        left, right = self._projections(classes, width + bias, features)
        tile = TILE_BYTES.get(features.device.type, TILE_BYTES["cuda"])
        rows = max(LEAST, tile // max(1, classes * features.itemsize))
        low = features.new_empty(n * length, left.shape[1])
        for first in range(0, n * length, rows):
            part = slice(first, first + rows)
            torch.mm(residual(part), left, out=low[part])
        hidden = features @ right[:width]
        if bias:
            hidden = hidden + right[-1]
        return torch.bmm(low.view(n, length, -1).transpose(1, 2), hidden).flatten(1)

    @torch.no_grad()
    def of_head(self, factors: HeadFactors) -> Tensor:
        """(n, p q) sketches of a head's gradients, whose residuals are not stored."""
        features, weight, bias = factors[:3]
        drawn = self._projections(len(weight), features.shape[-1] + (bias is not None), factors.lse)
        y = torch.where(factors.live.view(factors.labels.shape), factors.labels, IGNORED)
        made = ops.sketch(
            features,
            weight,
            bias,
            y,
            drawn,
            class_weight=factors.class_weight,
            ignore_index=IGNORED,
            label_smoothing=factors.label_smoothing,
        )
        return made.flatten(1)

    def _projections(self, classes: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (classes, width, like.dtype, like.device)
        if key not in self._drawn:
            drawn = ops.sketch_projections(classes, width, DIMENSIONS, dtype=like.dtype, device=like.device)
            self._drawn[key] = drawn
        return self._drawn[key]
