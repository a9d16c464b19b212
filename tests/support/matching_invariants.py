"""What holds of whatever answer of the matching solver."""

import torch

from selbp.ops import MatchStatus


def check(found, inner, k, n, nonnegative, valid):
    count, status = int(found.count), MatchStatus(int(found.status))
    assert found.indices.shape == found.weights.shape == (k,) and 0 <= count <= min(k, n)
    chosen, w = found.indices[:count], found.weights[:count]
    assert (found.indices[count:] == -1).all() and (found.weights[count:] == 0).all(), "match: padding"
    assert chosen.unique().numel() == count and ((chosen >= 0) & (chosen < n)).all(), "match: a row twice, or none"
    assert torch.isfinite(found.weights).all(), "match: weights"
    if nonnegative:
        assert (w > 0).all(), "match: a weight that is not positive"
    if valid is not None:
        assert valid[chosen].all(), "match: a row that may not be chosen"
    seen = inner if valid is None else inner[valid]
    if not torch.isfinite(seen).all():
        assert status == MatchStatus.INVALID and count == 0 and found.residual.isnan(), "match: not finite"
    if status == MatchStatus.FULL:
        assert count == k, "match: full"
