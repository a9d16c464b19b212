"""Tiles of classes that a row's gradient leaves out: ``skip_mass`` of ``linear_cross_entropy``.

With p the softmax, y the target and T its class weight, a row's residual without label smoothing is T p_c for the other
classes c and -T (1 - p_y) for y; the slope of a soft cap, at most 1, multiplies each. A row leaves out its least
probable tiles, of at most ``skip_mass`` (1 - p_y) together and never that of y. There T p_c is replaced by its mean
over the tile, so that the row still sums to 0 and the weights' common part, which all of the many small p_c share,
is kept. In sum of absolute values the row changes by at most 2 skip_mass T (1 - p_y), that part of what it sums to
without a cap. Its products with the features and the weight need the tile's mean of the weight alone.

The forward's state gives the probabilities: on a CPU its sum s over the other classes, relative to the running maximum
m, is read after every tile. So what is left out is known before the backward forms any logits. The tiles are one row
high, since rows differ in which classes they find likely: of 128 rows together hardly any is negligible. The backward
gathers the rows that a tile of classes is formed for; triton_kernels/skipped.py does on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from selbp.ops._loss_options import LossOptions

COLUMNS = 256  # classes of a tile: narrow enough to leave much out, wide enough for the products' full rate
FORMED = -1.0  # in the table: the row does not leave the tile out
_WHOLE = 2.0**40  # shares are added as integers, of which a GPU has the same running sums on every run
_WORTH = 0.25  # part of all tiles from which on leaving them out repays the gathering of rows


def leaves_out(skip_mass: float, options: LossOptions) -> bool:
    """Return whether anything may be left out: not with label smoothing, whose target lies on all classes."""
    return skip_mass > 0 and not options.label_smoothing


def table_shape(n: int, n_classes: int) -> tuple[int, int]:
    """Rows and tiles of the table of what is left out."""
    return n, -(-n_classes // COLUMNS)


def left_out(
    sums: Tensor,  # (tiles, n, 2) float64: m and s after each tile
    target: Tensor,  # (n,)
    p_rest: Tensor,  # (n,)
    skip_mass: float,
) -> Tensor:
    """(n, tiles) probability of the tiles that the row leaves out, else FORMED, as where its sums are not finite."""
    m, s = sums.unbind(2)
    reached = s * torch.exp(m - m[-1])
    share = reached.diff(dim=0, prepend=torch.zeros_like(reached[:1])).clamp_(min=0).div_(reached[-1]).t()
    return left_out_of(share, target, p_rest, skip_mass)


def left_out_of(
    share: Tensor,  # (n, tiles) part that each tile has of the probability of the row's other classes
    target: Tensor,  # (n,)
    p_rest: Tensor,  # (n,)
    skip_mass: float,
) -> Tensor:
    """What :func:`left_out` returns, from the tiles' shares."""
    share = share.contiguous()
    held = (target // COLUMNS).clamp(0, share.shape[1] - 1)[:, None]  # an ignored target is any number
    smallest, tile = share.scatter(1, held, torch.inf).sort(dim=1, stable=True)
    # NaN, and the target's tile, count as 2, which is more than any skip_mass.
    total = (smallest.nan_to_num(2.0, posinf=2.0) * _WHOLE).ceil().to(torch.int64).cumsum(1)
    small = torch.zeros_like(share, dtype=torch.bool).scatter_(1, tile, total <= int(skip_mass * _WHOLE))
    return torch.where(small, share * p_rest[:, None], FORMED).to(p_rest.dtype)


class Tiles(NamedTuple):
    """The rows that the backward of k rows forms for each tile, and what it leaves out."""

    rows: list[Tensor]  # of each tile: which rows its residuals are formed for
    left_out: Tensor  # (k, tiles) mean over the tile's classes of the scaled residuals that are not formed

    def of_features(self, weight: Tensor) -> Tensor:
        """(k, d) what is left out of the features' gradient."""
        dtype = self.left_out.dtype
        return self.left_out @ torch.stack([part.sum(0, dtype=dtype) for part in weight.split(COLUMNS)])

    def of_classes(self, features: Tensor) -> Tensor:
        """(tiles, d + 1) what is left out of the gradients of weight and bias of each class of a tile."""
        mean = self.left_out.t()
        return torch.cat([mean @ features.to(mean.dtype), mean.sum(1, keepdim=True)], 1).to(features.dtype)


def tiles_of(
    table: Tensor,  # (n, tiles) of :func:`left_out`, or of no elements
    n_classes: int,
    chosen: Tensor,  # (k,)
    grad: Tensor,  # (n,)
    target: Tensor,  # (n,)
    class_weight: Tensor | None,  # (C,)
) -> Tiles | None:
    """Return what the ``chosen`` rows form and leave out, or None if that is too little to repay the gathering.

    A row whose incoming gradient is not finite leaves nothing out: it spoils every class.
    """
    if not table.numel():
        return None
    scale, left = grad[chosen], table[chosen]
    y = target[chosen].clamp(0, n_classes - 1)  # one outside is found where its residual is formed
    out = ((left != FORMED) & scale.isfinite()[:, None]).scatter(1, y[:, None] // COLUMNS, False)
    if int(out.sum()) < _WORTH * out.numel():
        return None
    if class_weight is not None:
        scale = scale * class_weight[y]
    sizes = torch.full_like(left[0], COLUMNS)
    sizes[-1] -= len(sizes) * COLUMNS - n_classes
    return Tiles([chosen[some] for some in (~out).t()], torch.where(out, left * scale[:, None] / sizes, 0.0))
