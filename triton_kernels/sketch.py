"""Projected residuals P^T r_t of every token, the factor of a sequence's gradient sketch that needs the classes.

    S_i = sum_t (P^T r_t) (Q^T [h_t, 1])^T,        P (C, p), Q (d or d + 1, q)

r_c = g_c (T p_c - a_c) for c != y and r_y = g_y (A - T p_rest), in the terms of residual.py. P^T r has the shape of
attention with keys W and values P: ``statistics`` keeps, beside its own running sums and relative to the same
reference, O = sum_{c != y} g_c e_c P_c; and p_c = e_c p_rest / s with the p_rest and s that combine.py joins, so that

    P^T r = T (p_rest / s) O + r_y P_y - sum_{c != y} g_c a_c P_c

One pass over the classes gives both. The last sum is sum_c a_c P_c without the target's term, the same for every row;
where a cap bends it (g_c), the kernel sums w_c g_c P_c as well.

Tile picture: program (row tile, split) walks its class tiles and keeps m, s, s2 and ROWS x WIDTH sums in registers.

            [ W0 ] [ W1 ] [ W2 ]        (COLUMNS, d)
    [ H ]   |  e  |  e   |  e   |       each e (ROWS, COLUMNS) in registers only
               x     x      x
            [ P0 ] [ P1 ] [ P2 ]        (COLUMNS, p)   -> sums (ROWS, p), added over the splits in order here

Why one pass: the two passes that this replaces (statistics, then residuals from the finished lse, times P) cost
2 n C (2 d + p) flops and read W twice for each group of row tiles; this one costs 2 n C (d + p) and reads it once. Of
a program's 255 registers a thread, accumulators take COLUMNS ROWS / threads for z and WIDTH ROWS / threads for O: 64 +
32 of 128 x 128 tiles on 8 warps, against 128 of the widest ``statistics`` tile. Narrower tiles request more of the
cache, (ROWS + COLUMNS) d item for 2 ROWS COLUMNS d flops, 64 flops a byte instead of 85, which is why ``statistics``
alone keeps its own. For p > WIDTH the pass is repeated.

Bytes from DRAM at least (n + C) d item + C p item + splits n p 4; at n = 8192, C = 128256, d = 4096, p = 64 that is
1.1 GB, 0.34 ms on an H100, beside 8.7e12 flops, 8.8 ms at its peak: the product bounds it, and p / d = 1.6 % of it is
the projection. The epilogue takes 15.6 instructions a logit on sm_90, 0.12 cycles beside 2.0 of the product.

e and P are rounded to the inputs' dtype before their product. With label smoothing the difference of the two sums may
be small beside either: e's rounding, 2^-9 of p in bfloat16, is then larger relative to r, but it is no larger than that
of logits stored in bfloat16, and below the 1 / sqrt(p) of the projection itself.
"""

import torch

from . import configs
from .arithmetic import FLOOR, LOG2E
from .combine import finalize
from .linear_cross_entropy import row_terms
from .statistics import WIDTH, statistics
from .target_logit import target_logit


def projected_residuals(
    features: torch.Tensor,  # (n, d), last dimension contiguous
    weight: torch.Tensor,  # (C, d), last dimension contiguous
    bias: torch.Tensor | None,  # (C,)
    target: torch.Tensor,  # (n,) int64
    projection: torch.Tensor,  # (C, p)
    class_weight: torch.Tensor | None = None,  # (C,)
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    tile: configs.Tile | None = None,
    splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, p) float32 ``sum_c r_c P_c``, 0 where the row is not valid, and (n,) bool which rows are."""
    n_classes, projection = len(weight), projection.to(features.dtype).contiguous()
    z, feature_sq = target_logit(target, n_classes, features=features, weight=weight, bias=bias)
    found = [
        statistics(
            features,
            weight,
            bias,
            target,
            class_weight=class_weight,
            smooth=label_smoothing != 0.0,
            softcap=softcap,
            projection=projection[:, start : start + WIDTH],
            tile=tile,
            splits=splits,
        )
        for start in range(0, projection.shape[1], WIDTH)
    ]
    partials, sums = found[0][0], torch.cat([sums for _, sums in found], 3)
    _, lse, _, p_rest, _, valid = finalize(
        partials,
        z,
        feature_sq,
        target,
        n_classes,
        class_weight=class_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
    )
    y, _, _, _, mass, rest = row_terms(z, target, lse, p_rest, class_weight, label_smoothing, n_classes)
    reference = (partials[0].clamp_min(FLOOR.value) * LOG2E.value).ceil()  # as arithmetic.reference_exponent
    scale = torch.exp2(reference - reference.amax(0))
    s = (partials[1] * scale).sum(0)
    factor = scale * torch.where(s > 0.0, mass * (p_rest / s), 0.0)
    total = (sums[0] * factor[..., None]).sum(0)
    own = rest - mass * p_rest
    share = label_smoothing / n_classes
    if softcap:
        own = own / torch.cosh(z / softcap).square()
    if label_smoothing and softcap:
        total -= share * sums[1].sum(0)
    elif label_smoothing:
        w = torch.ones(n_classes, device=z.device) if class_weight is None else class_weight.float()
        total -= share * (w @ projection.float())
        own = own + share * w[y]
    total += own[:, None] * projection[y].float()
    return torch.where(valid[:, None], total, 0.0), valid
