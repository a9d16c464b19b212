"""Throughput of every operator beside eager torch and the peers: benchmarks/throughput_gpu.py."""

from __future__ import annotations

import contextlib
import io
from functools import partial

from benchmarks.throughput_gpu import throughput
from gpu_parts.results import Results


def measure(results: Results, shape: tuple[int, int, int], device: str) -> None:
    """One shape (n, C, d); what is printed becomes rows."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        throughput([shape], device)
    for line in said.getvalue().splitlines():
        name, _, figures = line.strip().partition(": ")
        results.add(name, None, detail=figures or "see above")


def run(results: Results, device: str, tiny: bool) -> None:
    """The roofline's shapes, and row counts beside a multiple of the tiles."""
    shapes = [(16, 50, 8)]
    if not tiny:
        shapes = [(4096, 1000, 2048), (8192, 32000, 4096), (8576, 32000, 4096), (8192, 128256, 4096)]
    for shape in shapes:
        results.row(f"operators at {shape}", partial(measure, results, shape, device))
