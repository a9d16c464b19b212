"""Writes what a run measured: JSON (everything), CSV (one row per contender), Markdown and, with matplotlib, a plot."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Row
from selbp import __version__, _native


def machine(device: torch.device, threads: int, clock: str) -> dict[str, Any]:
    """What a reader must know to compare two runs."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cpu_level": _native.level(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "clock": clock,
        "selbp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def duration(seconds: float) -> str:
    """Three significant digits with a unit that fits."""
    if math.isnan(seconds):
        return "–"
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s), (1e-9, "ns"))
    return f"{seconds / scale:.3g} {unit}"


def markdown(suite: str, rows: Sequence[Row]) -> str:
    """One table per suite."""
    lines = [
        f"### {suite}",
        "",
        "| case | contender | median | p20 – p80 | time / ours | of the roofline | ours / it, limit |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    case = None
    for row in rows:
        name, case = (row.case if row.case != case else ""), row.case
        if row.note:
            lines.append(f"| {name} | {row.contender} | – | – | – | – | {row.note} |")
            continue
        limit = (
            "" if row.limit is None else f"{1 / row.ratio:.3f} ≤ {row.limit:g} {'met' if row.passed else '**MISSED**'}"
        )
        of_bound = f"{row.roofline:.0%}" if row.roofline else "–"
        lines.append(
            f"| {name} | {row.contender} | {duration(row.median)} | {duration(row.p20)} – {duration(row.p80)} "
            f"| {row.ratio:.2f} | {of_bound} | {limit} |"
        )
    formulas = {row.case: row.formula for row in rows if row.formula}
    return "\n".join([*lines, "", *(f"* {name}: {formula}" for name, formula in formulas.items()), ""])


def write(
    folder: Path, results: Mapping[str, Sequence[Row]], about: Mapping[str, Any], roofline: Mapping[str, float]
) -> list[Path]:
    """Write every format under ``folder`` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"suite": suite, **asdict(row)} for suite, found in results.items() for row in found]
    whole = {"machine": about, "roofline": roofline, "rows": rows}
    files = [folder / "results.json", folder / "results.csv", folder / "results.md"]
    files[0].write_text(json.dumps(_without_nan(whole), indent=1) + "\n")
    if rows:
        with files[1].open("w", newline="") as stream:
            writer = csv.DictWriter(stream, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    facts = [f"* {key}: {value}" for key, value in about.items()]
    rates = [f"* {key}: {value:.1f}" for key, value in roofline.items()]
    tables = [markdown(suite, found) for suite, found in results.items()]
    files[2].write_text("\n".join(["## Benchmarks", "", *facts, "", "Measured in this run:", "", *rates, "", *tables]))
    return [file for file in [*files, _plot(folder / "results.png", results)] if file is not None and file.exists()]


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(file: Path, results: Mapping[str, Sequence[Row]]) -> Path | None:
    """Time of each contender over ours, one bar each, on a logarithmic axis; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = [row for found in results.values() for row in found if not row.note]
    if not rows:
        return None
    figure = Figure(figsize=(9, 1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row.ratio for row in rows], color=["C0" if row.ratio == 1.0 else "0.7" for row in rows])
    axes.set_yticks(places, [f"{row.case}: {row.contender}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1.0, color="C0", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("time / ours")
    figure.savefig(file, dpi=120)
    return file
