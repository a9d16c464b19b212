"""Ours against peers and against this machine's roofline, in one run: ``python -m benchmarks --help``."""
