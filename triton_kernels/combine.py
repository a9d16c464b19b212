"""Join the class splits of ``statistics`` with the target's logit into loss, lse, ||r||^2 and correctness.

Splits are added in order after rescaling by exact powers of two. With C = max(ref, ceil(z_y log2 e)) and

    a = 2^(ref - C) s     t = 2^(z_y log2 e - C)     Z = a + t      p_rest = a / Z = 1 - p_y

the row's loss against its own class is log(1 + a / t) where the target leads and log Z - (z_y log2 e - C) ln 2 where it
does not (there it exceeds ln 2, and only absolute accuracy counts); lse = z_y + that. With the soft target
t_y = (1 - eps) w_y + k w_y, a_c = k w_c for c != y, k = eps / C, T = t_y + k amount:

    loss    = t_y (lse - z_y) + k ln 2 (spread + amount (C - ref + log2 Z))          every term is >= 0
    ||r||^2 = g_y^2 (k amount - T p_rest)^2 + x^2 s2 + (x rho - k)^2 square,   x = T 2^(ref - C) / Z

(without smoothing: T^2 (g_y^2 p_rest^2 + s2 (2^(ref - C) / Z)^2)). Rows: ignored -> loss and ||r||^2 are 0; target out
of range -> NaN; NaN or +inf logits -> not finite; only rows with everything finite are ``valid``.

Tile picture: ROWS rows a program, one pass over the splits. Bytes: n (4 fields splits + 8 + 8 + 18) and the class
weight gathered; algebra on (n,) vectors, a few microseconds.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import FLOOR, LN2, LOG2E, MINUS_INFINITY, log1p, reference_exponent, soft_cap
from .online import merge_fit


@triton.jit
def outcome(state, z, g, w_y, ignored, present, square_h, n_classes, label_smoothing, SMOOTH: tl.constexpr):
    """From a row's sums over the other classes and its target's logit to what is known of the row.

    Returns (loss, lse, ||r||^2, p_rest, leads, valid, own, T).
    ``state`` as online.py keeps it; z and g are the target's logit and slope, w_y its class weight. ``own`` is the
    target's entry of r, and T what the other probabilities count in it.
    """
    m, ref, s = state[0], state[1], state[2]
    top = tl.maximum(ref, reference_exponent(z))
    x = tl.fma(z, LOG2E, -top)
    shrink = tl.exp2(ref - top)
    a = s * shrink
    t = tl.exp2(x)
    total = a + t
    log_total = tl.log(total)
    leads = z >= m
    against = tl.where(leads, log1p(a / tl.where(leads, t, 1.0)), log_total - x * LN2)
    # z_y = -inf leaves lse to the other classes; z_y + against would be -inf + inf.
    lse = tl.where(z == MINUS_INFINITY, tl.fma(top, LN2, log_total), z + against)
    p_rest = a / total
    if SMOOTH:
        share = label_smoothing / n_classes
        t_y = (1.0 - label_smoothing) * w_y + share * w_y
        mass = t_y + share * state[4]
        # Where every class that shares the target is excluded, 0 * (reference) must not become 0 * inf.
        rest = tl.where(state[4] == 0.0, 0.0, state[5] + state[4] * ((top - ref) + log_total * LOG2E))
        loss = t_y * against + (share * LN2) * rest
        own = g * (share * state[4] - mass * p_rest)
        factor = mass * (shrink / total)
        miss = factor * state[6] - share
        residual_sq = own * own + (factor * factor) * state[3] + (miss * miss) * state[7]
    else:
        loss = w_y * against
        mass = w_y
        own = -w_y * (g * p_rest)
        factor = w_y * (shrink / total)
        residual_sq = own * own + (factor * factor) * state[3]
    nan = float("nan")
    loss = tl.where(ignored, 0.0, tl.where(present, loss, nan))
    finite = tl.abs(loss) < float("inf")
    residual_sq = tl.where(finite, tl.where(present, residual_sq, 0.0), nan)
    valid = present & finite & (tl.abs(residual_sq) < float("inf")) & (tl.abs(square_h) < float("inf"))
    return loss, lse, residual_sq, p_rest, leads, valid, own, mass


@triton.jit(do_not_specialize=["n", "n_splits", "ignore_index"])
def finalize_kernel(
    partials,
    target_logit,
    feature_sq,
    class_weight,
    target,
    loss_out,
    lse_out,
    residual_sq_out,
    p_rest_out,
    correct_out,
    valid_out,
    n,
    n_splits,
    n_classes,
    ignore_index,
    label_smoothing,
    softcap,
    ROWS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The five outputs of each row from its partials [fields, splits, n] and its target logit."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    field = tl.cast(n_splits, tl.int64) * n
    m = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    ref = tl.full((ROWS,), FLOOR, tl.float32) * LOG2E
    s = tl.zeros((ROWS,), tl.float32)
    s2 = tl.zeros((ROWS,), tl.float32)
    if SMOOTH:
        amount = tl.zeros((ROWS,), tl.float32)
        spread = tl.zeros((ROWS,), tl.float32)
        rho = tl.zeros((ROWS,), tl.float32)
        square = tl.zeros((ROWS,), tl.float32)
    for split in range(0, n_splits):
        part = partials + tl.cast(split, tl.int64) * n + rows
        m_part = tl.load(part, mask=inside, other=0.0)
        ref_part = reference_exponent(m_part)
        m = tl.maximum(m, m_part)
        new = reference_exponent(m)
        scale = tl.exp2(ref - new)
        scale_part = tl.exp2(ref_part - new)
        square_scale, square_part = scale * scale, scale_part * scale_part
        s = s * scale + tl.load(part + field, mask=inside, other=0.0) * scale_part
        s2_part = tl.load(part + 2 * field, mask=inside, other=0.0) * square_part
        if SMOOTH:
            amount_part = tl.load(part + 3 * field, mask=inside, other=0.0)
            spread += amount * (new - ref)
            spread += tl.load(part + 4 * field, mask=inside, other=0.0) + amount_part * (new - ref_part)
            amount += amount_part
            rho, s2, square = merge_fit(
                rho * scale,
                s2 * square_scale,
                square,
                tl.load(part + 5 * field, mask=inside, other=0.0) * scale_part,
                s2_part,
                tl.load(part + 6 * field, mask=inside, other=0.0),
            )
        else:
            s2 = s2 * square_scale + s2_part
        ref = new

    z = tl.load(target_logit + rows, mask=inside, other=0.0)
    g = 1.0
    if SOFTCAP:
        z, g = soft_cap(z, softcap)
    square_h = tl.load(feature_sq + rows, mask=inside, other=0.0)
    y = tl.load(target + rows, mask=inside, other=0)
    in_range = (y >= 0) & (y < n_classes)
    ignored = y == ignore_index
    present = in_range & (y != ignore_index)
    w_y = 1.0
    if HAS_WEIGHT:
        w_y = tl.load(class_weight + tl.where(in_range, y, 0), mask=inside, other=0.0).to(tl.float32)
    state = m, ref, s, s2
    if SMOOTH:
        state = state + (amount, spread, rho, square)
    loss, lse, residual_sq, p_rest, leads, valid, _, _ = outcome(
        state, z, g, w_y, ignored, present, square_h, n_classes, label_smoothing, SMOOTH
    )
    tl.store(loss_out + rows, loss, mask=inside)
    tl.store(lse_out + rows, lse, mask=inside)
    tl.store(residual_sq_out + rows, residual_sq, mask=inside)
    tl.store(p_rest_out + rows, p_rest, mask=inside)
    tl.store(correct_out + rows, (valid & leads).to(tl.uint8), mask=inside)
    tl.store(valid_out + rows, valid.to(tl.uint8), mask=inside)


ROWS = 128


def finalize(
    partials: torch.Tensor,  # [3 or 7, splits, n] float32, of :func:`statistics` or :func:`logits_statistics`
    target_logit: torch.Tensor,  # (n,) float32, before the cap
    feature_sq: torch.Tensor,  # (n,) float32
    target: torch.Tensor,  # (n,) int64
    n_classes: int,
    *,
    class_weight: torch.Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, ...]:
    """(loss, lse, residual_sq, p_rest = 1 - p_y) float32 and (correct, valid) bool, each (n,)."""
    fields, n_splits, n = partials.shape
    loss, lse, residual_sq, p_rest = (torch.empty(n, dtype=torch.float32, device=partials.device) for _ in range(4))
    correct, valid = (torch.empty(n, dtype=torch.uint8, device=partials.device) for _ in range(2))
    if n:
        finalize_kernel[(triton.cdiv(n, ROWS),)](
            partials,
            target_logit,
            feature_sq,
            class_weight,
            target,
            loss,
            lse,
            residual_sq,
            p_rest,
            correct,
            valid,
            n,
            n_splits,
            n_classes,
            ignore_index,
            label_smoothing,
            softcap or 1.0,
            ROWS=ROWS,
            SOFTCAP=bool(softcap),
            SMOOTH=fields == 7,
            HAS_WEIGHT=class_weight is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return loss, lse, residual_sq, p_rest, correct.view(torch.bool), valid.view(torch.bool)
