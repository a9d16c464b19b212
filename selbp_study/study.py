"""A study: every arm of every cell tuned, trained at each budget with each seed, and what came out as one small dict.

Each arm of each cell is a job of :mod:`selbp_study.engine`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from selbp_study.arms import Arm
from selbp_study.config import RunConfig
from selbp_study.costs import Costs, cost_name, measure, steps_of
from selbp_study.data import Dataset
from selbp_study.engine import Finished, Job, Say, drive, searched
from selbp_study.pool import DatasetCache, Pool
from selbp_study.protocols import OWN_KEEP, Cell, Protocol
from selbp_study.tuning import Choice, search_rates, tuning_config

FORMAT = 1
POINTS = 4  # of a curve, its end included
ALIKE = 1.5  # two budgets share one tuned rate if their numbers of steps differ by at most this factor
OWN_KEEP_ARM = Arm("random", title="random, own keep")
Lines = list[dict[str, Any]]


@dataclass
class Plan:
    """What the jobs of one cell share."""

    cell: Cell
    protocol: Protocol
    base: RunConfig
    held_out: Dataset
    costs: Costs
    milliseconds: float = 0.0  # the budget of time

    def config(self, arm: Arm, keep: float | int) -> RunConfig:
        """``arm`` at one of the cell's keeps, with the cell's steps."""
        return arm.config(replace(self.base, keep=keep), 0)

    def own_keeps(self) -> list[RunConfig]:
        """Random, and each arm whose keep is tuned, at every keep that may be chosen."""
        arms = (OWN_KEEP_ARM, *map(Arm.parse, self.protocol.tuned_keeps))
        return [replace(self.config(arm, keep), keep=keep) for arm in arms for keep in self.protocol.own_keeps]

    def steps(self, budget: str, arm: Arm, config: RunConfig, keep: float | int) -> int:
        """How many steps a budget gives ``arm`` as ``config`` where the others choose ``keep``."""
        return steps_of(budget, replace(self.base, keep=keep), config, self.costs, self.milliseconds, arm.share)


def plan_cell(cell: Cell, protocol: Protocol, sets: DatasetCache, costs: Costs) -> Plan:
    """Read the cell's data, measure what is not measured yet, and set its budget of time."""
    data = sets(cell.dataset)
    base = RunConfig(
        dataset=data.name,
        fingerprint=data.fingerprint,
        selector="random",
        steps=cell.steps,
        lr=0.05,
        model=cell.model,
        batch_size=cell.batch_size,
        journal_every=200,
        threads=1,
        precision=cell.precision,
    )
    plan = Plan(cell, protocol, base, data.held_out(), costs)
    configs = [plan.config(Arm.parse(name), keep) for keep in cell.keeps for name in protocol.arms]
    own = plan.own_keeps()
    clean = sets(cell.dataset.partition("+")[0])
    costs.add([*configs, *own], lambda wanted: measure(wanted, clean))
    arms = [Arm.parse(protocol.clock)] if protocol.clock in protocol.arms else []
    clock = [plan.config(arm, keep) for arm in arms for keep in cell.keeps]
    plan.milliseconds = cell.steps * max(costs[config].median for config in clock or configs)
    return plan


# -------------------------------------------------------------------------------------------------------- jobs


def tuned(plan: Plan, configs: Sequence[RunConfig], start: float) -> Job[Choice]:
    """The best of ``configs``, which differ by their keeps, and its best rate, on held-out data."""
    by_keep = {config.keep: config for config in configs}
    return searched(
        search_rates(list(by_keep), start),
        lambda keep, lr, seed: tuning_config(by_keep[keep], plan.held_out, keep, lr, seed),
    )


def arm_job(plan: Plan, arm: Arm, keep: float | int, budgets: Sequence[str]) -> Job[Lines]:
    """Tune an arm and train it under each budget; budgets with about as many steps share the rate."""
    base = plan.config(arm, keep)
    choices: list[tuple[int, Choice]] = []
    asked: list[tuple[str, Choice, list[RunConfig]]] = []
    for budget in budgets:
        steps = plan.steps(budget, arm, base, keep)
        near = [choice for known, choice in choices if max(known, steps) <= ALIKE * min(known, steps)]
        if near:
            choice = near[0]
        else:
            start = choices[0][1].lr if choices else arm.rate()
            choice = yield from tuned(plan, [replace(base, steps=steps)], start)
            choices.append((steps, choice))
        asked.append((budget, choice, seeded(plan, replace(base, steps=steps, lr=choice.lr))))
    found = yield [config for _, _, configs in asked for config in configs]
    by_key = {one.config.key(): one for one in found}
    return [
        entry(plan, arm, keep, budget, choice, [by_key[config.key()] for config in configs])
        for budget, choice, configs in asked
    ]


def own_keep_job(plan: Plan, arm: Arm, name: str) -> Job[Lines]:
    """``arm`` at the keep and rate that are best under the budget of time; called ``name`` in the result."""
    keeps = [min(keep, plan.cell.batch_size) for keep in plan.protocol.own_keeps]
    configs: dict[float | int, RunConfig] = {keep: replace(plan.config(arm, keeps[0]), keep=keep) for keep in keeps}
    configs = {keep: replace(config, steps=plan.steps("time", arm, config, keep)) for keep, config in configs.items()}
    choice = yield from tuned(plan, list(configs.values()), arm.rate())
    found = yield seeded(plan, replace(configs[choice.keep], lr=choice.lr))
    keep = 0 if name == OWN_KEEP else plan.cell.keeps[0]  # 0: for every keep of the cell
    return [entry(plan, arm, keep, "time", choice, found) | {"arm": name}]


def seeded(plan: Plan, config: RunConfig) -> list[RunConfig]:
    """``config`` with each of the study's seeds, the first ones evaluated at a few points."""
    every = max(1, -(-config.steps // POINTS))
    return [
        replace(config, seed=seed, evaluate_every=every if place < plan.protocol.curves else config.steps)
        for place, seed in enumerate(plan.protocol.seeds)
    ]


def entry(
    plan: Plan, arm: Arm, keep: float | int, budget: str, choice: Choice, found: Sequence[Finished]
) -> dict[str, Any]:
    """One line of the result: an arm under a budget, in one cell."""
    config = found[0].config
    results = {one.config.seed: one.result for one in found if one.result is not None}
    longest = max((len(result["curve"]) for result in results.values()), default=0)
    recorded = [result["curve"] for result in results.values() if len(result["curve"]) == longest]
    points = [point["step"] for point in recorded[0]] if recorded else []
    curves = [[point["accuracy"] for point in curve] for curve in recorded]
    samples = [result["backward_samples"] for result in results.values()]
    return {
        "dataset": plan.cell.dataset,
        "model": plan.cell.model,
        "batch_size": plan.cell.batch_size,
        "cell_keep": keep,
        "budget": budget,
        "arm": arm.name,
        "label": arm.label,
        "keep": config.keep,
        "lr": config.lr,
        "steps": config.steps,
        "samples": sum(samples) / len(samples) if samples else 0,
        "cost": cost_name(config),
        "accuracy": {str(seed): round(result["accuracy"], 4) for seed, result in results.items()},
        "gain": _median(results, "gain"),
        "gain_at_cost": _median(results, "gain_at_cost"),
        "errors": {str(one.config.seed): one.error for one in found if one.result is None},
        "curve": [
            [step, round(sum(values) / len(values), 3)]
            for step, values in zip(points, zip(*curves, strict=True), strict=True)
        ],
        "curves": {
            str(seed): [[point["step"], round(point["accuracy"], 4)] for point in result["curve"]]
            for seed, result in results.items()
            if len(result["curve"]) == longest
        },
        "tuning": [list(tried) for tried in choice.tried],
        "key": config.key(),
    }


def _median(results: dict[int, dict[str, Any]], name: str) -> float | None:
    """Of the seeds that know it, to three digits."""
    values = (result.get(name) for result in results.values())
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(f"{statistics.median(known):.3g}") if known else None


def run_study(
    protocol: Protocol,
    pool: Pool,
    *,
    progress: Callable[[int, int], None] = lambda done, known: None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Run what is missing of ``protocol`` and return the whole result."""
    pool.folder.mkdir(parents=True, exist_ok=True)
    costs = Costs(pool.folder / "costs.json")
    plans = [plan_cell(cell, protocol, pool.sets, costs) for cell in protocol.cells]
    jobs: dict[str, Job[Lines]] = {}
    for plan in plans:
        where = f"{plan.cell.dataset}, {plan.cell.model}, n={plan.cell.batch_size}"
        if "time" in protocol.budgets:
            jobs[f"{where}: {OWN_KEEP}"] = own_keep_job(plan, OWN_KEEP_ARM, OWN_KEEP)
            for name in protocol.tuned_keeps:
                arm = Arm.parse(name)
                jobs[f"{where}: {name}, own keep"] = own_keep_job(plan, arm, arm.name)
        for keep in plan.cell.keeps:
            for name in (name for name in protocol.arms if name not in protocol.tuned_keeps):
                jobs[f"{where}, keep {keep}: {name}"] = arm_job(plan, Arm.parse(name), keep, protocol.budgets)

    def on_end(run: Finished) -> None:
        if run.error is not None:
            say(f"{run.config.selector}, rate {run.config.lr:g}, seed {run.config.seed}: failed: {run.error}")

    ended = drive(jobs, pool, progress=progress, on_end=on_end, say=say)
    asked = [
        plan.config(arm, keep) for plan in plans for keep in plan.cell.keeps for arm in map(Arm.parse, protocol.arms)
    ]
    used = {cost_name(config) for config in [*asked, *(config for plan in plans for config in plan.own_keeps())]}
    return {
        "format": FORMAT,
        "protocol": asdict(protocol),
        "machine": costs.machine,
        "costs": {name: asdict(cost) for name, cost in costs.costs.items() if name in used},
        "seconds": [plan.milliseconds / 1e3 for plan in plans],  # budget of time of each cell
        "entries": [line for name in jobs for line in ended[name] if not isinstance(ended[name], str)],
        "failed": {name: ended[name] for name in jobs if isinstance(ended[name], str)},
    }
