"""Choosing k rows on the device: by rank, and at random with known inclusion probabilities.

Nothing here reads a value back to the host: shapes depend on n and k alone, and rows that do not exist are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top_rows(key: Tensor, eligible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k eligible rows of greatest key, the lower index first among equals.

    ``key`` (n,) finite where ``eligible`` (n,) bool. Returns indices (k,) int64 and which slots are real (k,) bool:
    slots beyond the number of eligible rows repeat the first row chosen (row 0 where there is none).
    """
    order = torch.where(eligible, key, -torch.inf).sort(descending=True, stable=True).indices[:k]
    real = torch.arange(k, device=key.device) < eligible.sum()
    spare = torch.where(real[:1], order[:1], 0)
    return torch.where(real, order, spare), real
