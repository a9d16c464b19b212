"""From a study's result to tables and verdicts, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selbp_study.protocols import OWN_KEEP
from selbp_study.statistics import Difference, Verdict, holm, paired, t_quantile
from selbp_study.text import markdown_table, plain

BASELINES = ("random", OWN_KEEP)
EQUAL = {"steps": "equal steps", "samples": "equal samples", "time": "equal time"}
FIRST = {"full": 0, "random": 1, OWN_KEEP: 2}  # in tables; the others as the protocol has them
Entry = dict[str, Any]
Place = tuple[str, str, int, float | int]  # data set, model, minibatch, keep


def place_of_entry(entry: Entry) -> Place:
    """The cell that an entry belongs to; random with its own keep has keep 0: it belongs to all of them."""
    return entry["dataset"], entry["model"], entry["batch_size"], entry["cell_keep"]


def accuracies(entry: Entry) -> dict[int, float]:
    """Test accuracy by seed."""
    return {int(seed): value for seed, value in entry["accuracy"].items()}


@dataclass
class Row:
    """An entry and its difference to the baseline of its budget (None for the baseline itself)."""

    entry: Entry
    difference: Difference | None
    p: float | None = None  # after Holm's correction, where the study claims a family

    @property
    def verdict(self) -> Verdict:
        """Ahead, behind, no difference."""
        return "-" if self.difference is None else self.difference.verdict(self.p)

    def accuracy(self) -> str:
        """Mean ± standard deviation, per cent."""
        values = list(accuracies(self.entry).values())
        if not values:
            return "failed"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lost = f" ({len(self.entry['errors'])} failed)" if self.entry["errors"] else ""
        collapsed = sum(value < statistics.median(values) / 2 for value in values)  # a mean hides a failed training
        lost += f" ({collapsed} of {len(values)} collapsed)" if collapsed else ""
        return f"{statistics.fmean(values):.2f}{spread}{lost}"

    def rate(self) -> str:
        """The tuned learning rate, marked where it is the greatest or the least that was tried."""
        tried = [lr for keep, lr, *_ in self.entry["tuning"] if keep == self.entry["keep"]]
        edge = bool(tried) and self.entry["lr"] in (min(tried), max(tried))
        return f"{self.entry['lr']:g}{'†' if edge else ''}"

    def against(self) -> str:
        """The difference and its verdict."""
        if self.difference is None:
            return "–"
        text = self.difference.text()
        return f"**{self.verdict}** {text}" if self.verdict in ("ahead", "behind") else text


class Findings:
    """Rows by cell and budget, with their differences."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.result, self.entries = result, result["entries"]
        self.places = list(dict.fromkeys(place_of_entry(entry) for entry in self.entries if entry["cell_keep"]))
        self.budgets = [b for b in result["protocol"]["budgets"] if any(e["budget"] == b for e in self.entries)]
        # Equal samples differ from equal steps where the keep does; then an arm gets a line below its own.
        self.shown = [budget for budget in self.budgets if budget != "samples" or "steps" not in self.budgets]
        self.rows = {(place, budget): self._rows(place, budget) for place in self.places for budget in self.budgets}
        if result["protocol"]["claim"]:
            for budget in self.budgets:
                rows = (row for place in self.places for row in self.rows[place, budget])
                family = [
                    (row, row.difference.p)
                    for row in rows
                    if row.difference and row.difference.p is not None and row.entry["arm"] not in BASELINES
                ]
                for (row, _), p in zip(family, holm([p for _, p in family]), strict=True):
                    row.p = p

    def baseline(self, place: Place, budget: str) -> Entry | None:
        """Random as this budget's differences take it: with its own keep under time, else with the cell's."""
        by_arm = {entry["arm"]: entry for entry in reversed(self._entries(place, budget))}
        return (by_arm.get(OWN_KEEP) if budget == "time" else None) or by_arm.get("random")

    def _entries(self, place: Place, budget: str) -> list[Entry]:
        """Those of a cell, and those that belong to each keep of it."""
        places = (place, (*place[:3], 0))
        return [e for at in places for e in self.entries if place_of_entry(e) == at and e["budget"] == budget]

    def _rows(self, place: Place, budget: str) -> list[Row]:
        base = self.baseline(place, budget)
        entries = sorted(self._entries(place, budget), key=lambda e: FIRST.get(e["arm"], len(FIRST)))
        if base is None:
            return [Row(e, None) for e in entries]
        others = [None if e["key"] == base["key"] else paired(accuracies(e), accuracies(base)) for e in entries]
        return [Row(e, difference) for e, difference in zip(entries, others, strict=True)]

    def cost(self, entry: Entry) -> dict[str, Any]:
        """The measured cost of an entry's step."""
        cost: dict[str, Any] = self.result["costs"][entry["cost"]]
        return cost

    def lengths(self, place: Place) -> tuple[int, float]:
        """The budgets of a cell: its steps, and its seconds."""
        for cell, seconds in zip(self.result["protocol"]["cells"], self.result["seconds"], strict=True):
            if (cell["dataset"], cell["model"], cell["batch_size"]) == place[:3] and place[3] in cell["keeps"]:
                return cell["steps"], float(seconds)
        raise ValueError(f"no cell is {place}")

    def verdicts(self, budget: str) -> dict[str, list[Verdict]]:
        """Each arm's verdicts by cell, by label; random itself left out."""
        found: dict[str, list[Verdict]] = {}
        for place in self.places:
            for row in self.rows[place, budget]:
                if row.entry["arm"] not in BASELINES:
                    found.setdefault(row.entry["label"], []).append(row.verdict)
        return found


def title_of(place: Place) -> str:
    """A cell in words."""
    dataset, *changes = place[0].split("+")
    data = {"fashion-mnist": "Fashion-MNIST", "bible-kjv": "King James Bible, next character"}.get(dataset, dataset)
    data = " with ".join([data, *filter(None, [" and ".join(map(change_in_words, changes))])])
    models = {"cnn": "small CNN", "wide-cnn": "wider CNN", "mlp": "MLP", "resnet": "small ResNet"}
    keep = place[3]
    kept = keep if isinstance(keep, int) else round(keep * place[2])
    return f"{data}, {models.get(place[1], place[1])}, {kept} of {place[2]} samples"


def change_in_words(change: str) -> str:
    """What ``NAME=NUMBER`` does to the training part."""
    name, _, number = change.partition("=")
    words = {
        "noise": f"{float(number):.0%} wrong training labels",
        "class-noise": f"{float(number):.0%} of six classes taken for the class most alike",
        "long-tail": f"long-tailed classes, 1 to {number}",
        "duplicates": f"{float(number):.0%} duplicates",
    }
    return words[name]


def cell_table(findings: Findings, place: Place) -> str:
    """One cell: each arm's step, and its accuracy at equal steps, at equal samples and at equal time."""
    gains = any(row.entry.get("gain") for budget in findings.budgets for row in findings.rows[place, budget])
    head = ["arm", "keep", "ms a step", *(["gain"] if gains else [])]
    by_arm: dict[tuple[str, str], dict[str, Row]] = {}
    for budget in findings.budgets:
        for row in findings.rows[place, budget]:
            by_arm.setdefault((row.entry["arm"], row.entry["label"]), {})[budget] = row
    for budget in findings.shown:
        steps = ["steps"] if budget != "steps" else []
        head += [*steps, "rate", f"{EQUAL[budget]}: accuracy, %", "minus random"]
    lines = []
    for (_, label), rows in sorted(by_arm.items(), key=lambda item: FIRST.get(item[0][0], len(FIRST))):
        first = next(iter(rows.values())).entry
        keep = first["keep"]
        keep = "all" if keep == 1.0 and isinstance(keep, float) else f"{keep}"
        line = [plain(label), keep, f"{findings.cost(first)['median']:.2f}", *([gain_of(first)] if gains else [])]
        known, extra = len(line), list[str]()
        for budget in findings.shown:
            line += _cells(rows.get(budget), budget != "steps")
        samples, steps_row = rows.get("samples"), rows.get("steps")
        if samples is not None and steps_row is not None and samples.entry["key"] != steps_row.entry["key"]:
            extra = [f"{plain(label)}, {samples.entry['steps']} steps (equal samples)", *line[1:known]]
            for budget in findings.shown:
                extra += _cells(samples if budget == "steps" else None, budget != "steps")
        lines += [line, extra] if extra else [line]
    return markdown_table(head, lines)


def gain_of(entry: Entry) -> str:
    """The median gain of its steps at equal k and, where it is known, at equal cost."""
    known = [f"{entry[name]:.3g}" for name in ("gain", "gain_at_cost") if entry.get(name) is not None]
    return " / ".join(known) or "–"


def _cells(row: Row | None, steps: bool) -> list[str]:
    if row is None:
        return ["–"] * (4 if steps else 3)
    count = [str(row.entry["steps"])] if steps else []
    return [*count, row.rate(), row.accuracy(), row.against()]


def seconds_at(findings: Findings, entry: Entry, step: float) -> float:
    """Processor seconds of ``step`` steps of an entry, what is paid once included."""
    cost = findings.cost(entry)
    return float(cost["phases"].get("once", 0.0) + step * cost["median"]) / 1e3


def time_ratio(findings: Findings, entry: Entry, base: Entry) -> str:
    """Seconds until an entry has the final accuracy that ``base`` has with the same seed, over the seconds of ``base``.

    The geometric mean over the seeds with a curve, and its 95 % interval. Between its points a curve is a line.
    """
    ratios, late = [], 0
    for seed, target in accuracies(base).items():
        curve = entry.get("curves", {}).get(str(seed))
        if curve is None or len(curve) < 2:
            continue
        step = first_reached(curve, target)
        if step is None:
            late += 1
        else:
            ratios.append(math.log(seconds_at(findings, entry, step) / seconds_at(findings, base, base["steps"])))
    if late or len(ratios) < 2:
        return f"not reached by {late} of {late + len(ratios)} seeds" if late else "–"
    mean = statistics.fmean(ratios)
    half = t_quantile(0.05, len(ratios) - 1) * statistics.stdev(ratios) / math.sqrt(len(ratios))
    return f"{math.exp(mean):.2f} [{math.exp(mean - half):.2f}, {math.exp(mean + half):.2f}]"


def first_reached(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """The step at which a curve of (step, accuracy) first has ``target``; None where it never does."""
    for (before, low), (after, high) in zip(curve, curve[1:], strict=False):
        if low < target <= high:
            return before + (after - before) * (target - low) / (high - low)
    return float(curve[0][0]) if curve[0][1] >= target else None


def direct_table(findings: Findings, place: Place) -> str | None:
    """At equal time, each arm minus the full batch, and its time to random's accuracy; None without a full batch."""
    if "time" not in findings.budgets:
        return None
    rows, base = findings.rows[place, "time"], findings.baseline(place, "time")
    full = next((row.entry for row in rows if row.entry["arm"] == "full"), None)
    if full is None or base is None:
        return None
    lines = []
    for row in rows:
        if row.entry["arm"] in FIRST:
            continue
        difference = paired(accuracies(row.entry), accuracies(full))
        text = "–" if difference is None else difference.text()
        lines.append([plain(row.entry["label"]), text, time_ratio(findings, row.entry, base)])
    head = ["arm, equal time", "minus the full batch", "time to random's final accuracy, of random's"]
    return markdown_table(head, lines) if lines else None


def summary_table(findings: Findings) -> str:
    """In how many cells each arm is ahead of random, behind it, or neither, by budget."""
    verdicts = {budget: findings.verdicts(budget) for budget in findings.shown}
    labels = list(dict.fromkeys(label for found in verdicts.values() for label in found))

    def count(label: str, budget: str) -> str:
        found = verdicts[budget].get(label, [])
        return ", ".join(
            f"{found.count(word)} {word}" for word in ("ahead", "no difference", "behind", "-") if found.count(word)
        ).replace("- ", "")

    return markdown_table(
        ["arm", *(EQUAL[budget] for budget in verdicts)],
        ([plain(label), *(count(label, budget) for budget in verdicts)] for label in labels),
    )


def answer(findings: Findings) -> str:
    """The abstract's question, answered from the verdicts alone."""
    words = EQUAL | {"samples": "equal backward samples"}
    sentences = []
    for budget in findings.budgets:
        verdicts = {label: found for label, found in findings.verdicts(budget).items() if not label.startswith("full")}
        cells = len(findings.places)
        always = [label for label, found in verdicts.items() if found.count("ahead") == cells]
        pairs = [verdict for found in verdicts.values() for verdict in found]
        sentences.append(
            f"At {words[budget]}, of {len(pairs)} pairs of an arm and a cell {pairs.count('ahead')} are ahead of "
            f"random, {pairs.count('behind')} behind it, {pairs.count('no difference')} show no difference; "
            + (f"ahead in every cell: {', '.join(map(plain, always))}." if always else "no arm is ahead in every cell.")
        )
    return "\n".join(f"* {sentence}" for sentence in sentences)
