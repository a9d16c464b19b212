"""What a step does with vectors of a minibatch, each in one launch of one program or of a few rows each.

``unscored_kernel``    which rows have a target and are finite, and the unit of their mean, before any forward
``hits_kernel``        how many of the rows that train have their target as torch's arg max of the logits
``weighted_sum_kernel``  sum_j w_j s l_j over the slots that have a weight: the scalar to differentiate

Sums are in float64, or in whole numbers. One program walks the rows, so that every sum has one order: some
microseconds for as many rows as MOST_ROWS, where the launches of torch's operators would be five to twelve.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import mean_unit

MOST_ROWS = 4096
MOST_LOGITS = 1 << 17  # logits that one program looks through for hits
LOOKED_AT = 1024  # logits that it reads at a time
BLOCK = 1024


@triton.jit(do_not_specialize=["n", "ignore_index"])
def unscored_kernel(
    target,
    finite,
    class_weight,
    mass_out,
    valid_out,
    never_out,
    unknown_out,
    scale_out,
    n,
    n_classes,
    ignore_index,
    BLOCK: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Of each row its mass, whether it is valid, 0 and NaN; and the unit s = n / (sum of the valid rows' masses)."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < n
        y = tl.load(target + rows, mask=inside, other=0)
        present = inside & (y != ignore_index)
        mass = tl.where(present, 1.0, 0.0)
        if HAS_WEIGHT:
            known = tl.minimum(tl.maximum(y, 0), n_classes - 1)
            mass = tl.load(class_weight + known, mask=present, other=0.0).to(tl.float32)
        valid = present & (tl.load(finite + rows, mask=inside, other=0) != 0)
        total += tl.where(valid, mass, 0.0).to(tl.float64)
        tl.store(mass_out + rows, mass, mask=inside)
        tl.store(valid_out + rows, valid.to(tl.uint8), mask=inside)
        tl.store(never_out + rows, tl.zeros((BLOCK,), tl.uint8), mask=inside)
        tl.store(unknown_out + rows, tl.full((BLOCK,), float("nan"), tl.float32), mask=inside)
    tl.store(scale_out, mean_unit(n, tl.sum(total, 0)))


@triton.jit(do_not_specialize=["n", "ignore_index"])
def hits_kernel(
    logits,
    target,
    live,
    hits_out,
    n,
    n_classes,
    stride,
    ignore_index,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """hits_out: rows whose target leads, and rows with a target, of those that are live. NaN leads, as in torch."""
    hits = tl.zeros((ROWS,), tl.int32)
    counts = tl.zeros((ROWS,), tl.int32)
    for first in range(0, n, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = rows < n
        y = tl.load(target + rows, mask=inside, other=0)
        present = inside & (y != ignore_index) & (tl.load(live + rows, mask=inside, other=0) != 0)
        known = present & (y >= 0) & (y < n_classes)
        at = tl.where(known, y, 0)
        z_rows = logits + rows.to(tl.int64)[:, None] * stride
        own = tl.load(logits + rows.to(tl.int64) * stride + at, mask=known, other=0.0).to(tl.float32)[:, None]
        beaten = tl.zeros((ROWS,), tl.int32)
        for start in range(0, n_classes, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            mask = known[:, None] & (columns < n_classes)[None, :]
            z = tl.load(z_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            ahead = columns[None, :] < at[:, None]  # of equal ones the first leads
            better = ((z > own) | ((z == own) & ahead)) & (own == own)
            better = better | ((z != z) & ((own == own) | ahead))
            beaten += tl.sum((better & mask).to(tl.int32), 1)
        hits += (known & (beaten == 0)).to(tl.int32)
        counts += present.to(tl.int32)
    tl.store(hits_out, tl.sum(hits, 0).to(tl.int64))
    tl.store(hits_out + 1, tl.sum(counts, 0).to(tl.int64))


@triton.jit(do_not_specialize=["k"])
def weighted_sum_kernel(losses, scale, weights, loss_out, scaled_out, k, BLOCK: tl.constexpr):
    """scaled_out = s losses; loss_out = the sum of w s l over the slots whose weight is not 0."""
    s = tl.load(scale).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, k, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        inside = slots < k
        scaled = tl.load(losses + slots, mask=inside, other=0.0) * s
        w = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(w != 0.0, scaled * w, 0.0).to(tl.float64)
        tl.store(scaled_out + slots, scaled, mask=inside)
    tl.store(loss_out, tl.sum(total, 0).to(tl.float32))


def unscored(
    target: torch.Tensor,  # (n,) int64
    finite: torch.Tensor,  # (n,) bool
    class_weight: torch.Tensor | None,  # (C,)
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n,) float32 mass, (n,) bool valid, (n,) bool False, (n,) float32 NaN and () float32 the unit."""
    n = len(target)
    mass, unknown = (torch.empty(n, dtype=torch.float32, device=target.device) for _ in range(2))
    valid, never = (torch.empty(n, dtype=torch.bool, device=target.device) for _ in range(2))
    scale = mass.new_empty(())
    unscored_kernel[(1,)](
        target,
        finite.view(torch.uint8),
        class_weight,
        mass,
        valid.view(torch.uint8),
        never.view(torch.uint8),
        unknown,
        scale,
        n,
        0 if class_weight is None else len(class_weight),
        ignore_index,
        BLOCK=BLOCK,
        HAS_WEIGHT=class_weight is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return mass, valid, never, unknown, scale


def hits(
    logits: torch.Tensor,  # (n, C), last dimension contiguous
    target: torch.Tensor,  # (n,) int64
    live: torch.Tensor,  # (n,) bool
    ignore_index: int,
) -> torch.Tensor:
    """(2,) int64: how many live rows have their target as the arg max, and how many have a target."""
    n, n_classes = logits.shape
    columns = max(16, min(1024, triton.next_power_of_2(n_classes)))
    found = torch.empty(2, dtype=torch.int64, device=logits.device)
    hits_kernel[(1,)](
        logits,
        target,
        live.view(torch.uint8),
        found,
        n,
        n_classes,
        logits.stride(0),
        ignore_index,
        ROWS=LOOKED_AT // columns,
        COLUMNS=columns,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return found


def weighted_sum(
    losses: torch.Tensor,  # (k,) float32
    scale: torch.Tensor,  # () floating
    weights: torch.Tensor,  # (k,) floating
) -> tuple[torch.Tensor, torch.Tensor]:
    """() float32 sum of w s l, and (k,) float32 s l."""
    loss, scaled = losses.new_empty(()), torch.empty_like(losses)
    weighted_sum_kernel[(1,)](
        losses, scale, weights, loss, scaled, len(losses), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return loss, scaled
