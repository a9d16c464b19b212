"""The target's logit and the feature norm of every row, gathered apart from the pass over the classes.

    z_y = h . W[y] + c[y] (before any cap)       ||h||^2 = sum_d h_d^2

``statistics`` leaves the target's class out of its sums (that is what keeps a confident row from cancelling), so the
target's logit comes from here. It need not agree with a tile of H W^T to the last bit, because nothing is subtracted
from such a tile; and no tile has to look for its target, which halves the instructions per logit there.

Where the logits are stored, z_y is read from them instead (one 4-byte gather a row) and only ||h||^2 is computed.
A row without a target (ignored or out of range) is given class 0, as the specification does for its lse.

Tile picture: one program owns ROWS rows and walks d in steps of DEPTH; h and W[y] are read once, coalesced along d.

    rows        |<-- DEPTH -->|          z_y  ||h||^2
    ROWS  |     h     .*  W[y]     | ->   |     |

Bytes: n (2 d item + item_bias + 8 + 8); flops: 4 n d. Bandwidth-bound: about 20 us for n = 8192, d = 4096 in bf16 at
3.35 TB/s. Offsets are 64-bit: C d may exceed 2^31.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["n"])
def target_logit_kernel(
    features,
    weight,
    bias,
    logits,
    target,
    target_logit,
    feature_sq,
    n,
    d,
    n_classes,
    stride_h,
    stride_w,
    stride_z,
    plus,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_FEATURES: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """target_logit[i] = h_i . W[y_i] + c[y_i] (or logits[i, y_i]); feature_sq[i] = ||h_i||^2 + plus."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    y = tl.load(target + rows, mask=inside, other=0)
    y = tl.where((y >= 0) & (y < n_classes), y, 0)
    z = tl.zeros((ROWS,), tl.float32)
    square = tl.zeros((ROWS,), tl.float32)
    if HAS_FEATURES:
        for k in range(0, d, DEPTH):
            columns = k + tl.arange(0, DEPTH)
            mask = inside[:, None] & (columns < d)[None, :]
            h = tl.load(features + rows[:, None] * stride_h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            square += tl.sum(h * h, 1)
            if not HAS_LOGITS:
                w = tl.load(weight + y[:, None] * stride_w + columns[None, :], mask=mask, other=0.0).to(tl.float32)
                z += tl.sum(h * w, 1)
        square += plus
    else:
        square += 1.0
    if HAS_LOGITS:
        z = tl.load(logits + rows * stride_z + y, mask=inside, other=0.0).to(tl.float32)
    elif HAS_BIAS:
        z += tl.load(bias + y, mask=inside, other=0.0).to(tl.float32)
    tl.store(target_logit + rows, z, mask=inside)
    tl.store(feature_sq + rows, square, mask=inside)


ROWS, DEPTH = 16, 256


def target_logit(
    target: torch.Tensor,  # (n,) int64
    n_classes: int,
    *,
    features: torch.Tensor | None,  # (n, d), last dimension contiguous
    weight: torch.Tensor | None = None,  # (C, d), last dimension contiguous
    bias: torch.Tensor | None = None,  # (C,)
    logits: torch.Tensor | None = None,  # (n, C), last dimension contiguous: z_y is read from here where given
    plus: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n,) float32 target logit before any cap, and (n,) float32 ``||h||^2 + plus`` (1 without features)."""
    n = len(target)
    z = torch.empty(n, dtype=torch.float32, device=target.device)
    feature_sq = torch.empty_like(z)
    if n:
        target_logit_kernel[(triton.cdiv(n, ROWS),)](
            features,
            weight,
            bias,
            logits,
            target,
            z,
            feature_sq,
            n,
            0 if features is None else features.shape[1],
            n_classes,
            0 if features is None else features.stride(0),
            0 if weight is None else weight.stride(0),
            0 if logits is None else logits.stride(0),
            plus,
            ROWS=ROWS,
            DEPTH=DEPTH,
            HAS_FEATURES=features is not None,
            HAS_LOGITS=logits is not None,
            HAS_BIAS=bias is not None,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return z, feature_sq
