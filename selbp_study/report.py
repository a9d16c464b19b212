"""What a comparison leaves behind: results.jsonl, table.md, three plots and one page that needs nothing but itself."""

from __future__ import annotations

import html
import json
import textwrap
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from selbp.info import machine
from selbp_study.compare import Comparison, Outcome
from selbp_study.data import Dataset
from selbp_study.page import embedded, page, to_html
from selbp_study.plots import Bars, bars_plot, curves_plot
from selbp_study.storage import write_bytes, write_text
from selbp_study.table import Line, lines_of, markdown, on_terminal
from selbp_study.text import one_line, plain
from selbp_study.timing import PARTS, clock_for

CAPTIONS = {  # of the plots, by the names of their files
    "samples": "Test accuracy against the samples that ran backward. Lines are means over seeds, bands span them.",
    "seconds": "The same runs against the seconds spent training: forward, selection, backward and optimizer.",
    "time": "Where a step's time goes. Scoring costs a forward of the whole minibatch. Random and the full batch need "
    "none: what they show there is the step's own code.",
}

COLUMNS = {
    "minus random": "mean over seeds of the difference to the random arm of the same seed (the same initial weights "
    "and order of samples), with its 95 % t interval when there are several seeds. An interval that holds 0 shows no "
    "difference. One interval in twenty misses by chance alone; nothing here is corrected for the number of arms.",
    "at equal seconds": "mean over seeds of the test accuracy when the quickest arm had ended, read off each run's "
    "curve. The other arms' rates have not decayed by then, so this favours the quickest.",
    "backward samples": "samples that ran backward in one run: steps times the samples kept of each minibatch.",
    "forward": "seconds of one run in forward passes: scoring the whole minibatch (its per-sample statistics "
    "included), and the forward of the chosen samples where they run again. The random arm scores nothing.",
    "select": "seconds in choosing: what the rule reads of the gradients, and the rule itself.",
    "backward": "seconds in the backward pass of the chosen samples.",
    "total": "seconds of the whole steps, the optimizer's part included; loading, evaluation and saving are not in "
    "it. All seconds are processor time, summed over the threads (on a GPU: by its clock), the median of every 50 "
    "steps times their number; the arms of a seed train in turn, a few steps each. So other programs on the machine do "
    "not tip the scale.",
}


def settings_of(comparison: Comparison, data: Dataset) -> dict[str, str]:
    """What all arms share, in words."""
    base = comparison.base
    epochs = base.steps * base.batch_size / len(data.train)
    keep = f"{base.keep:g}" if isinstance(base.keep, float) else f"{base.keep} rows"
    budget = {
        "steps": f"{base.steps} steps for every arm ({epochs:.1f} epochs)",
        "samples": f"the backward samples of {base.steps} steps at keep {keep}, for every arm",
        "time": f"{comparison.milliseconds / 1e3:.1f} s for every arm, by the measured cost of its step",
    }
    return {
        "data": f"{data.name}: {len(data.train)} training and {len(data.test)} test images ({data.source})",
        "model": base.model,
        "minibatch": f"{base.batch_size} samples, of which {base.kept()} run backward, unless the arm says otherwise",
        "budget": budget[comparison.budget],
        "optimizer": f"SGD, Nesterov momentum {base.momentum:g}, weight decay {base.weight_decay:g}; each run's rate "
        f"rises for {base.warmup:.0%} of its steps, then falls linearly to 0",
        "seeds": ", ".join(map(str, comparison.seeds)),
        "backward": base.backward,
        "scoring": base.scoring,
        "head gradient": base.head_gradient,
    }


def caveats(comparison: Comparison, lines: Sequence[Line]) -> list[str]:
    """What the table does not show, said before it is read."""
    notes = []
    if comparison.budget == "steps":
        notes.append(
            "Every arm takes the same number of steps. Random does so in less time, because it scores nothing: read "
            "the plot against seconds before calling another rule faster, and remember that a curve's early part "
            "runs at a rate that has not decayed yet, so that only end points are finished trainings."
        )
    elif comparison.budget == "time":
        notes.append(
            "Every arm takes the steps that fit in the same time, by the median cost of its step, measured alone "
            "before training: the seconds below are the runs' own, and those of a busy machine are longer."
        )
    else:
        notes.append("Every arm runs the same number of samples backward; the scoring forward comes on top of that.")
    seeds = len(comparison.seeds)
    if seeds < 5:
        plural = "one seed" if seeds == 1 else f"{seeds} seeds"
        notes.append(f"{plural.capitalize()}: differences of a few tenths of a point are not established by this.")
    if len({line.lr for line in lines}) == 1 and len(lines) > 1:
        notes.append(
            "One learning rate serves every arm here, which may favour some: --tune gives each arm its own, chosen on "
            "held-out training data. The test part evaluates; it chooses nothing."
        )
    else:
        notes.append("Arms have learning rates of their own. The test part evaluates; it chooses nothing.")
    clock = clock_for(comparison.base.device)
    other = [line.label for line in lines if any(result.get("clock", "wall") != clock for result in line.results)]
    if other:
        notes.append(
            f"Runs of an earlier version, whose seconds are by the wall clock and compare with no others here: "
            f"{', '.join(other)}."
        )
    failed = [line.label for line in lines if line.errors]
    if failed:
        notes.append(f"Failed, wholly or in part: {', '.join(failed)}; the reasons stand below the table.")
    return notes


def comparison_page(
    comparison: Comparison, data: Dataset, lines: Sequence[Line], plots: dict[str, bytes], command: str
) -> str:
    """The whole of report.html."""

    def definitions(title: str, values: dict[str, str]) -> str:
        terms = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in values.items())
        return f"<h2>{title}</h2><dl>{''.join(terms)}</dl>"

    def items(tag: str, texts: Iterable[str]) -> str:
        return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)

    base = comparison.base
    errors = items("li", (f"{line.label}, {text}" for line in lines for text in line.errors))
    return page(
        f"selbp: {data.name}, {len(lines)} arms",
        (
            "<h1>Training on a chosen part of each minibatch</h1>",
            f'<p class="lead">{html.escape(data.name)}, {html.escape(base.model)}: each step chooses {base.kept()} of '
            f"{base.batch_size} samples, or as many as the table says under keep, and runs backward through those "
            "alone.</p>",
            f'<div class="note">{items("p", caveats(comparison, lines))}</div>',
            f"<h2>Results</h2>\n{to_html(markdown(lines))}",
            f"<p>Accuracy: mean ± standard deviation over seeds.</p>{errors and f'<ul>{errors}</ul>'}",
            *(embedded(plots[name], caption) for name, caption in CAPTIONS.items()),
            definitions("What the columns mean", COLUMNS),
            definitions("Settings", settings_of(comparison, data)),
            definitions("Machine", machine()),
            f"<h2>Again</h2><p><code>{html.escape(command)}</code><br>"
            f"written {time.strftime('%Y-%m-%d %H:%M:%S %Z')}</p>",
        ),
    )


def plots_of(name: str, lines: Sequence[Line]) -> dict[str, bytes]:
    """The three plots as PNG, by the names of their files; ``name`` says what was trained."""
    done = [line for line in lines if line.results]
    axes = {"backward_samples": "samples that ran backward (thousands)", "seconds": "processor seconds of training"}
    samples, seconds = (
        curves_plot([line.curve(axis) for line in done], unit, f"{name}: accuracy against {unit}")
        for axis, unit in axes.items()
    )
    bars = [Bars(line.label, {part: line.milliseconds(part) for part in PARTS}, line.milliseconds()) for line in done]
    return {"samples": samples, "seconds": seconds, "time": bars_plot(bars)}


def write_report(
    comparison: Comparison, data: Dataset, outcomes: Sequence[Outcome], folder: Path, command: str
) -> tuple[Path, str]:
    """Write everything into ``folder``; returns the page's path, and for a terminal the table and its caveats."""
    lines = lines_of(outcomes)
    rows = []
    for outcome in outcomes:
        row = {"arm": outcome.arm.label, "config": outcome.config.as_dict(), "error": outcome.error}
        if outcome.result is not None:
            row |= {name: value for name, value in outcome.result.items() if name != "config"}
        rows.append(json.dumps(row, sort_keys=True))
    write_text(folder / "results.jsonl", "\n".join(rows) + "\n")
    notes = caveats(comparison, lines)
    write_text(folder / "table.md", "\n\n".join([markdown(lines).rstrip(), *map(plain, notes)]) + "\n")
    plots = plots_of(f"{data.name}, {comparison.base.model}", lines)
    for plot, png in plots.items():
        write_bytes(folder / f"{plot}.png", png)
    write_text(folder / "report.html", comparison_page(comparison, data, lines, plots, command))
    said = [textwrap.fill(one_line(note), 110, break_on_hyphens=False) for note in notes]
    return folder / "report.html", "\n\n".join([on_terminal(lines).rstrip(), *said])
