"""Writes what a run measured: JSON (everything), CSV (a row per contender), two tables in Markdown, and a plot (SVG).

``bench.md`` is the short table, which the documentation's page has: for each suite the case in the middle, by a rule of
code (:func:`summary`), so that nobody chooses what is shown. ``bench_all.md`` has every row.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import NAN, Row
from selbp import __version__, _native
from selbp.info import processor

START, END = "<!-- benchmarks/results/bench.md -->", "<!-- end of benchmarks/results/bench.md -->"
Results = Mapping[str, Sequence[Row]]


def machine(device: torch.device, threads: int, clock: str, kept: bool = False, quick: bool = False) -> dict[str, Any]:
    """What a reader must know to compare two runs."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "cpu_level": _native.level(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
        "clock": clock,
        "freed memory is kept": kept,
        "cases": "small ones only" if quick else "all",
        "selbp": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": ", ".join(f"{name} {version}" for name, version in peers.versions().items()),
    }


# -------------------------------------------------------------------------------------------------------- formatting


def duration(seconds: float) -> str:
    """Three significant digits with a unit that fits."""
    if math.isnan(seconds):
        return "–"
    scale, unit = next(((s, u) for s, u in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")) if seconds >= s), (1e-9, "ns"))
    return f"{seconds / scale:.3g} {unit}"


def _mebibytes(count: float) -> str:
    return "–" if math.isnan(count) else f"{count / 2**20:.1f}" if count < 100 << 20 else f"{count / 2**20:.0f}"


def _bias(row: Row) -> str:
    """What lies within two standard errors of 0 is not told from it."""
    if math.isnan(row.bias):
        return "–"
    return f"{row.bias:.2f}" if row.bias > 2 * row.bias_error else f"0 ± {row.bias_error:.2f}"


def _limit(row: Row) -> str:
    if row.limit is None or math.isnan(row.ratio):
        return ""
    return f"{1 / row.ratio:.3f} ≤ {row.limit:.3g} {'met' if row.passed else '**MISSED**'}"


def _number(form: str, value: float) -> str:
    return "–" if math.isnan(value) else format(value, form)


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("median", lambda row: duration(row.median)),
    ("p20 – p80", lambda row: f"{duration(row.p20)} – {duration(row.p80)}"),
    ("time / ours", lambda row: _number(".2f", row.ratio)),
    ("of the roofline", lambda row: _number(".0%", row.roofline) if row.roofline else "–"),
    ("samples/s", lambda row: _number(".4g", row.per_second)),
    ("of the ideal", lambda row: _number(".0%", row.ideal)),
    ("residual", lambda row: _number(".3f", row.residual)),
    ("bias", _bias),
    ("host reads", lambda row: _number(".0f", row.host_reads)),
    ("peak MiB", lambda row: _mebibytes(row.peak_bytes)),
    ("ours / it, limit", _limit),
)


def markdown(suite: str, rows: Sequence[Row]) -> str:
    """One table per suite; a column appears where a row has something in it."""
    shown = [(title, cell) for title, cell in COLUMNS if any(cell(row).strip("– ") for row in rows)]
    lines = [
        f"### {suite}",
        "",
        "| case | contender | " + " | ".join(title for title, _ in shown) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    case = None
    for row in rows:
        name, case = (row.case if row.case != case else ""), row.case
        contender = f"{row.contender} ({row.note})" if row.note else row.contender
        lines.append(f"| {name} | {contender} | " + " | ".join(cell(row) for _, cell in shown) + " |")
    formulas: dict[str, list[str]] = {}
    for row in rows:
        if row.formula and row.case not in formulas.setdefault(row.formula, []):
            formulas[row.formula].append(row.case)
    bounds = [f"* {formula} ({len(cases)} cases, such as {cases[0]})" for formula, cases in formulas.items()]
    if any(row.roofline > 1.05 for row in rows):
        bounds.append("* above 100 %: the formula counts work that this contender avoids")
    return "\n".join([*lines, "", *bounds, ""])


# ------------------------------------------------------------------------------------------------------ the short one


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def _fastest_peer(rows: Sequence[Row]) -> Row | None:
    return min((row for row in rows if row.peer), key=lambda row: row.ratio, default=None)


def summary(about: Mapping[str, Any], results: Results) -> str:
    """One line per suite: its median case by ours / fastest peer (the worse of two in the middle), best and worst.

    The bound is the roofline, or the ideal of a whole step. A peer does the whole task: marks do not count, nor do
    variants of ours.
    """
    lines = [
        "| suite | its median case | ours | of its bound | fastest peer there | ours / it | over all cases | "
        "peak MiB, ours / it |",
        "|---|---|---:|---:|---|---:|---|---:|",
    ]
    for suite, rows in results.items():
        ranked: list[tuple[float, Row, Row]] = []
        for found in _by_case(rows).values():
            peer = _fastest_peer(found)
            if peer is not None:
                ranked.append((1.0 / peer.ratio, found[0], peer))
        if not ranked:
            continue
        ranked.sort(key=lambda entry: entry[0])
        ratio, ours, peer = ranked[len(ranked) // 2]
        bound = ours.ideal if not math.isnan(ours.ideal) else ours.roofline or NAN
        best, worst = ranked[0][0], ranked[-1][0]
        lost = sum(entry[0] > 1.0 for entry in ranked)
        every = f"{best:.2g} – {worst:.2g}" + (f"; slower in {lost} of {len(ranked)}" if lost else "")
        memory = f"{_mebibytes(ours.peak_bytes)} / {_mebibytes(peer.peak_bytes)}"
        lines.append(
            f"| {suite} | {ours.case} | {duration(ours.median)} | {_number('.0%', bound)} | {peer.contender} "
            f"| {ratio:.2g} | {every} | {memory} |"
        )
    threads = f"{about['threads']} thread" + ("s" if about["threads"] != 1 else "")
    where = about["cpu"] if about["device"] == "cpu" else about["device"]
    kept = ", freed memory kept by the process" if about["freed memory is kept"] else ""
    cases = about.get("cases", "all")
    kept += f"; cases: {cases}" if cases != "all" else ""
    return "\n".join(
        [
            *lines,
            "",
            f"{where}, {about['cores']} cores, {about['cpu_level']}; {threads}, {about['clock']} time{kept}; "
            f"selbp {about['selbp']}, torch {about['torch']}, Python {about['python']}; {about['peers']}.",
            "",
        ]
    )


def publish(table: Path, page: Path) -> None:
    """Put ``table`` between the markers of ``page``. Raises ValueError where they are missing."""
    text = page.read_text()
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must have {START} and {END} once")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{table.read_text().strip()}\n{END}{after}")


# ------------------------------------------------------------------------------------------------------------- files


def write(folder: Path, results: Results, about: Mapping[str, Any], roofline: Mapping[str, float]) -> list[Path]:
    """Write every format under ``folder`` and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"suite": suite, **asdict(row)} for suite, found in results.items() for row in found]
    whole = {"machine": about, "roofline": roofline, "rows": rows}
    files = [folder / name for name in ("bench.json", "bench.csv", "bench.md", "bench_all.md")]
    files[0].write_text(json.dumps(_without_nan(whole), indent=1) + "\n")
    if rows:
        with files[1].open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    files[2].write_text(summary(about, results))
    facts = [f"* {key}: {value}" for key, value in about.items()]
    rates = [f"* {key}: {value:.1f}" for key, value in roofline.items()]
    tables = [markdown(suite, found) for suite, found in results.items()]
    files[3].write_text(
        "\n".join(
            [
                "# Benchmarks",
                "",
                *facts,
                "",
                "Rates of this machine, measured in the same run:",
                "",
                *rates,
                "",
                "Contenders named `ours: ...` are variants of ours; those with `alone` do a part of the task only.",
                "Host reads: values or lengths that a call waits for; peak: resident memory above the inputs;",
                "residual and bias: of the chosen, weighted gradients, relative to the mean gradient's norm.",
                "",
                *tables,
            ]
        )
        + "\n"
    )
    plot = _plot(folder / "bench.svg", results)
    return [file for file in [*files, plot] if file is not None and file.exists()]


def load(file: Path) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The machine and the rows of a ``bench.json``."""
    whole = json.loads(file.read_text())
    results: dict[str, list[Row]] = {}
    for entry in whole["rows"]:
        suite = entry.pop("suite")
        numbers = {field.name for field in fields(Row) if field.type == "float"}
        results.setdefault(suite, []).append(
            Row(**{key: NAN if value is None and key in numbers else value for key, value in entry.items()})
        )
    return whole["machine"], results


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plot(file: Path, results: Results) -> Path | None:
    """A line per case: ours as a fraction of its bound, and each peer's time over ours; None without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return None
    cases = [found for rows in results.values() for found in _by_case(rows).values() if found[0].median > 0]
    if not cases:
        return None
    figure = Figure(figsize=(11, 1.2 + 0.19 * len(cases)), layout="constrained")
    bound, ratio = figure.subplots(1, 2, sharey=True)
    places = range(len(cases))
    shares = [found[0].roofline if math.isnan(found[0].ideal) else found[0].ideal for found in cases]
    bound.barh(places, [share if share > 0 else 0.0 for share in shares], color="C0")
    bound.set_yticks(places, [found[0].case for found in cases], fontsize=6)
    bound.set_xlabel("ours, fraction of the roofline (rows and whole steps: of the ideal)")
    for place, found in enumerate(cases):
        times = [(row.ratio, "C1" if row.peer else "0.6") for row in found[1:] if row.ratio > 0 and not row.ours]
        ratio.scatter([t for t, _ in times], [place] * len(times), c=[c for _, c in times], s=12)
    ratio.axvline(1.0, color="C0", linewidth=0.8)
    ratio.set_xscale("log")
    ratio.set_xlabel("time / ours: peers orange, marks (a part of the task) grey")
    bound.invert_yaxis()
    with matplotlib.rc_context({"svg.hashsalt": "selbp", "svg.fonttype": "none"}):
        figure.savefig(file, metadata={"Date": None})
    return file
