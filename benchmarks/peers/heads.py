"""Head and loss in one, as others do it: (features (n, d), weight (C, d), target (n,)) -> differentiable loss (n,).

torch      ``F.cross_entropy(F.linear(...))``, eager, or rows in chunks, each recomputed in the backward, so that one
           chunk's logits exist at a time
Liger      ``liger_fused_linear_cross_entropy`` (pip install liger-kernel): GPU only, unmeasured; versions before July
           2026 multiply every row's gradient by the first row's upstream one
CCE        ``linear_cross_entropy`` (pip install cut-cross-entropy): GPU only, unmeasured
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Unavailable
from benchmarks.peers import on_a_gpu

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """All logits, stored for the backward."""
    return F.cross_entropy(F.linear(features, weight), target, reduction="none")


def chunks(features: Tensor, weight: Tensor, target: Tensor, rows: int = 128) -> Tensor:
    """``rows`` at a time; the backward recomputes each chunk's logits."""
    parts = zip(features.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(eager, h, weight, y, use_reentrant=False) for h, y in parts])


def liger() -> Head | Unavailable:
    """Unmeasured."""
    absent = on_a_gpu("liger-kernel")
    if absent is not None:
        return absent
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda features, weight, target: liger_fused_linear_cross_entropy(features, weight, target, reduction="none")


def cut_cross_entropy() -> Head | Unavailable:
    """Unmeasured."""
    absent = on_a_gpu("cut-cross-entropy")
    if absent is not None:
        return absent
    from cut_cross_entropy import linear_cross_entropy

    return lambda features, weight, target: linear_cross_entropy(features, weight, target, reduction="none")


def others() -> dict[str, Callable[..., object] | Unavailable]:
    """All but eager torch, as contenders: (features, weight, target, upstream (n,)) -> both gradients."""
    peers: dict[str, Head | Unavailable] = {
        "eager, 128 rows at a time, recomputed": chunks,
        "Liger": liger(),
        "Cut Cross-Entropy": cut_cross_entropy(),
    }
    return {name: head if isinstance(head, Unavailable) else partial(_gradients, head) for name, head in peers.items()}


def _gradients(head: Head, features: Tensor, weight: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    loss = head(features, weight, target)
    return torch.autograd.grad(loss, (features, weight), upstream.to(loss.dtype))
