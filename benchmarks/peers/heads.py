"""Head and loss in one, as others do it: (features (n, d), weight (C, d), target (n,)) -> differentiable loss (n,).

torch      ``F.cross_entropy(F.linear(...))``; ``F.linear_cross_entropy``, whose chunks only a mean loss has: per-sample
           losses take its reference path
chunks     eager torch, rows in chunks, each recomputed in the backward, so that one chunk's logits exist at a time
Liger      ``LigerFusedLinearCrossEntropyFunction`` (pip install liger-kernel): GPU only, unmeasured
CCE        ``linear_cross_entropy`` (pip install cut-cross-entropy): GPU only, unmeasured
"""

from __future__ import annotations

from collections.abc import Callable

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


def torch_fused() -> Head | Unavailable:
    """Torch's own, of torch 2.13 and later."""
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        return Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return lambda features, weight, target: function(features, weight, target, reduction="none")


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
