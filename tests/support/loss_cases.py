"""Inputs and error bounds shared by the tests of the operators around the cross-entropy."""

import itertools

import torch

from selbp import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (7, 2, 3), (33, 10, 5), (3, 16, 8), (64, 17, 65), (5, 1000, 33), (2, 5001, 7)]  # n, C, d
OPTIONS = [
    dict(weighted=w, label_smoothing=e, softcap=c) for w, e, c in itertools.product((False, True), (0.0, 0.1), (0.0, 5))
]


def problem(n, n_classes, d, dtype, weighted, scale=3.0):
    """Logits, target (one row ignored), features and class weights or None, all exact in ``dtype``."""
    logits = (torch.randn(n, n_classes) * scale).to(dtype)
    target = torch.randint(n_classes, (n,))
    if n > 2:
        target[1] = -100
    class_weight = torch.rand(n_classes).to(dtype) if weighted else None
    return logits, target, torch.randn(n, d).to(dtype), class_weight


def confident(dtype, n_classes=1000):
    """Rows whose 1 - p_y runs from 1e-12 to 0.1, exact in ``dtype``, and their statistics in float64."""
    q = torch.logspace(-12, -1, 45, dtype=torch.float64)
    logits = torch.randn(len(q), n_classes, dtype=torch.float64)
    target = torch.randint(n_classes, (len(q),))
    others = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    logits.scatter_(1, target[:, None], (others + torch.log((1 - q) / q))[:, None])
    logits = logits.to(dtype)
    exact = reference.cross_entropy_statistics(logits.double(), target)
    return logits, target, exact


def double(tensor):
    """``tensor`` in float64; None stays None."""
    return None if tensor is None else tensor.double()


def assert_error(name, ours, eager, exact, eps, exponent=0.0):
    """Our greatest error is at most 3 times eager's in our dtype, or a few roundings of the greatest value.

    Four roundings where float64 is the truth, and half of ``exponent`` where the greatest e^(z - lse) takes a
    difference of terms of that size. In float64 the reference errs as much as we do.
    """
    roundings = 64 if eps < 1e-10 else 4 + 0.5 * exponent
    rows = torch.isfinite(exact)
    assert torch.equal(torch.isfinite(ours), rows), f"{name}: finite in other places than the reference"
    if rows.any():
        ours, eager, exact = ours[rows].double(), eager[rows].double(), exact[rows]
        bound = max(3 * float((eager - exact).abs().max()), roundings * eps * float(exact.abs().max()))
        error = float((ours - exact).abs().max())
        assert error <= bound, f"{name}: error {error:.2e} exceeds {bound:.2e}"


def assert_statistics(ours, eager, exact):
    """Every field of ``ours`` against the float64 ``exact``, bounded by the error of ``eager`` in our dtype."""
    for name in ("loss", "lse", "residual_sq", "feature_sq"):
        field = getattr(ours, name)
        assert_error(name, field, getattr(eager, name), getattr(exact, name), torch.finfo(field.dtype).eps)
    assert torch.equal(ours.correct, exact.correct)
    assert torch.equal(ours.valid, exact.valid)


def compute_dtype(dtype):
    """What eager torch is run in to be compared with: our own output dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32
