"""Nonnegative least squares for many problems at once, and a sparse nonnegative fit, without any training.

The task: each signal is a nonnegative mixture of known spectra. Which ones, and how much of each?
Run as ``python examples/05_batched_nnls.py``.
"""

from __future__ import annotations

import torch

import selbp

SIGNALS, BANDS, SPECTRA, MIXED = 500, 60, 40, 3


def main() -> None:
    """Unmix all signals by ``nnls``, then each by at most three spectra with ``match``."""
    torch.manual_seed(0)
    spectra = torch.rand(BANDS, SPECTRA, dtype=torch.float64)
    truth = torch.zeros(SIGNALS, SPECTRA, dtype=torch.float64)
    places = torch.rand(SIGNALS, SPECTRA).topk(MIXED).indices
    truth.scatter_(1, places, torch.rand(SIGNALS, MIXED, dtype=torch.float64) + 0.5)
    signals = truth @ spectra.T + 1e-3 * torch.randn(SIGNALS, BANDS, dtype=torch.float64)

    # One call, 500 problems. `a` may differ from problem to problem; here it is the same for all.
    found = selbp.ops.nnls(spectra.expand(SIGNALS, BANDS, SPECTRA), signals)
    print(f"nnls: least coefficient {float(found.min()):.1e}, largest error {float((found - truth).abs().max()):.3f}")

    # With the inner products at hand, they need not be formed again.
    gram, inner = spectra.T @ spectra, signals @ spectra
    again = selbp.ops.nnls_gram(gram.expand(SIGNALS, SPECTRA, SPECTRA), inner)
    print(f"nnls_gram: largest difference {float((again - found).abs().max()):.1e}")

    # At most three spectra a signal: greedy, with exact weights.
    sparse = selbp.ops.match(gram.expand(SIGNALS, SPECTRA, SPECTRA), inner, signals.square().sum(1), k=MIXED, ridge=0.0)
    right = (sparse.indices.sort(1).values == places.sort(1).values).all(1)
    print(f"match: all three spectra right in {int(right.sum())} of {SIGNALS} signals")
    print(f"match: median relative residual {float(sparse.residual.median()):.1e}")


if __name__ == "__main__":
    main()
