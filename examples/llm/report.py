"""The recipe's table, plot and page."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ("#1f77b4", "#7f7f7f", "#ff7f0e", "#2ca02c", "#d62728")
WIDTH, HEIGHT, LEFT, BELOW = 560, 300, 50, 35


def by_arm(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, one a seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in result["arms"]:
        found.setdefault(run["arm"], []).append(run)
    return found


def markdown(result: dict[str, Any]) -> str:
    """What was run, and a line for each arm."""
    setup, arms = result["setup"], by_arm(result)
    seeds = len(next(iter(arms.values())))
    start = statistics.mean(run["curve"][0][2] for runs in arms.values() for run in runs)
    lines = [
        f"A Llama of {result['parameters'] / 1e6:.1f} million parameters (vocabulary {setup['vocabulary']}), "
        f"pre-trained for {setup['steps']} steps ({result['pre_training_seconds']:.0f} s) on {result['paragraphs']} "
        f"paragraphs of documentation, then fine-tuned on {result['docstrings']} docstrings and junk "
        f"({setup['junk']:.0%} of all): {setup['seconds']:.0f} processor seconds an arm, minibatches of "
        f"{setup['rows']} samples of up to {setup['length']} tokens, {setup['keep']:.0%} of them kept. Loss by "
        f"the token on {result['evaluated']} docstrings of other files; before fine-tuning it was {start:.3f}. "
        f"Mean of {seeds} {'seed' if seeds == 1 else 'seeds'} of the fine-tuning, and the range over them. "
        f"torch {result['torch']}, Transformers {result['transformers']}, {result['threads']} thread.",
        "",
        "| arm | loss | range | against random, same seed | steps | junk among the chosen | backward |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    random = {run["seed"]: run["curve"][-1][2] for run in arms.get("random", [])}
    for name, runs in arms.items():
        last = [run["curve"][-1][2] for run in runs]
        ahead = [run["curve"][-1][2] - random[run["seed"]] for run in runs if run["seed"] in random]
        against = "" if name == "random" or not ahead else f"{min(ahead):+.3f} to {max(ahead):+.3f}"
        junk = statistics.mean(1 - run["chosen"]["clean"] for run in runs)
        steps = statistics.mean(run["steps"] for run in runs)
        way = "all rows" if name == "full" else "before the forward" if name == "random" else runs[0]["backward"]
        lines.append(
            f"| {name} | {statistics.mean(last):.3f} | {min(last):.3f} to {max(last):.3f} | {against} | {steps:.0f} | "
            f"{junk:.0%} | {way} |"
        )
    kinds = [kind for kind in result["arms"][0]["chosen"] if kind != "clean"]
    lines += ["", "Weight of each kind of junk among the chosen:", ""]
    lines += ["| arm | " + " | ".join(kinds) + " |", "|---|" + "--:|" * len(kinds)]
    for name, runs in arms.items():
        shares = (f"{statistics.mean(run['chosen'][kind] for run in runs):.0%}" for kind in kinds)
        lines.append(f"| {name} | " + " | ".join(shares) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> str:
    """Mean loss over processor seconds, an SVG."""
    arms = by_arm(result)
    curves = {
        name: [
            (statistics.mean(run["curve"][i][0] for run in runs), statistics.mean(run["curve"][i][2] for run in runs))
            for i in range(len(runs[0]["curve"]))
        ]
        for name, runs in arms.items()
    }
    points = [point for curve in curves.values() for point in curve]
    right, low = max(x for x, _ in points), min(y for _, y in points)
    high = sorted(curve[1][1] for curve in curves.values())[-1]  # the start is far above: the lines begin at the edge
    span = max(high - low, 1e-6)

    def at(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - 10) * x / right
        return f"{across:.1f},{10 + (HEIGHT - BELOW - 10) * min(1 - (y - low) / span, 1.0) if y <= high else 10:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT},10 V{HEIGHT - BELOW} H{WIDTH - 10}" fill="none" stroke="black"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 5}">processor seconds, of {right:.0f}</text>',
        f'<text x="5" y="16">{high:.2f}</text><text x="5" y="{HEIGHT - BELOW}">{low:.2f}</text>',
        '<text x="60" y="22">loss on held-out text</text>',
    ]
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(at(x, y) for x, y in curve[1:])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<text x="{WIDTH - 190}" y="{26 + 15 * i}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def publish(result: dict[str, Any]) -> None:
    """Write the result file, and from it the table and plot that the documentation's page includes."""
    (RESULTS / "llm.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "llm.md").write_text(markdown(result))
    (ROOT / "docs" / "_static" / "llm.svg").write_text(plot(result))
