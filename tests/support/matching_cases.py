"""Problems for ``selbp.ops.match`` and what holds of every answer."""

import torch

from selbp.ops import MatchStatus

F64, F32 = torch.float64, torch.float32
RULES = ("ols", "normalized", "raw")
# Relative to 1: float32 cannot certify a residual below 3e-4, the square root of what a rounded Gram leaves.
FLOOR = {F64: 1e-7, F32: 3e-4}


def rows(n, p, *, seed=0, shift=0.3, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, p, generator=generator, dtype=F64) + shift
    return (g * torch.rand(n, 1, generator=generator, dtype=F64).exp()).to(dtype)


def problem(g, target=None):
    """Gram, inner products and target's squared norm of explicit rows (..., n, p), formed in float64."""
    exact = g.double()
    target = exact.mean(-2) if target is None else target.double()
    inner = (exact @ target[..., None])[..., 0]
    return (exact @ exact.mT).to(g.dtype), inner.to(g.dtype), target.square().sum(-1).to(g.dtype)


def ridged(gram, ridge, valid=None):
    valid = torch.ones(len(gram), dtype=torch.bool) if valid is None else valid
    lam = ridge * gram.diagonal()[valid].mean() if valid.any() else 0.0
    return gram + lam * torch.eye(len(gram), dtype=gram.dtype)


def check(found, gram, inner, target_sq, k, nonnegative=True):
    """What holds for whatever one problem: a feasible selection and an honest residual."""
    n = len(inner)
    count = int(found.count)
    assert found.indices.dtype == torch.int64 and found.count.dtype == torch.int32 and found.status.dtype == torch.uint8
    assert found.indices.shape == found.weights.shape == (k,) and 0 <= count <= min(k, n)
    chosen, w = found.indices[:count], found.weights[:count]
    assert (found.indices[count:] == -1).all() and (found.weights[count:] == 0).all()
    assert chosen.unique().numel() == count and ((chosen >= 0) & (chosen < n)).all()
    assert torch.isfinite(found.weights).all()
    if nonnegative:
        assert (w > 0).all()
    if int(found.status) == MatchStatus.FULL:
        assert count == k
    if torch.isfinite(found.residual) and target_sq > 0:
        b, t, w = inner.double()[chosen], target_sq.double(), w.double()
        # Rounding is relative to the terms, which may cancel to much less than they are.
        scale = w.abs() @ gram.double()[chosen][:, chosen].abs() @ w.abs() + 2 * w.abs() @ b.abs() + t
        square = t - 2 * w @ b + w @ gram.double()[chosen][:, chosen] @ w
        slack = 1e-13 if found.weights.dtype == F64 else 1e-7  # of the weights' and the residual's rounding
        assert abs(float(found.residual.double() ** 2 - square.clamp(min=0) / t)) <= 4 * slack * float(scale / t)
