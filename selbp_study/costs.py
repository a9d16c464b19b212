"""What a step costs: measured once, alone, all arms in turn, so that a budget of time is arithmetic and not a clock.

The time of an arm is the median processor time of its step, times its steps. The median is taken over steps that
change hands between the arms every few steps, in one process with one thread: whatever else the machine does slows
all arms alike. It holds the whole step: forward, scoring, choosing, backward, optimizer; not the reading of the data,
which is timed beside it: random could read the k samples that it keeps instead of all n.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from selbp.allocator import keep_freed_memory
from selbp.info import machine
from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.folder import is_number, short
from selbp_study.run import PHASES, Run, thread_limit, typical
from selbp_study.sampled import SampledOrder
from selbp_study.storage import checked, read_object, write_text

WARM = 30  # steps of each arm before the first that counts
# Consecutive steps of an arm. The first is not counted, because it runs with the previous arm's data in the caches.
BLOCK = 6
ROUNDS = 20
TOTAL = PHASES.index("total")
ONCE = "once"


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a step: median and quartiles of processor time, and the medians of its phases.

    The phases "read" and "read kept" are no part of the step: a minibatch, and k rows of one. "once" is what the arm
    pays before its first step.
    """

    median: float
    low: float
    high: float
    phases: dict[str, float]


def cost_name(config: RunConfig) -> str:
    """What a step's cost depends on: neither seed, rate, length nor what was changed in the training part."""
    name = config.dataset.removesuffix("-held-out").partition("+")[0]
    own = {name: getattr(config, name) for name in "head_gradient backward scoring cut options precision".split()}
    given = ",".join(f"{name}={value}" for name, value in own.items() if value != getattr(RunConfig, name))
    arm = "@".join(filter(None, (config.selector, given)))
    return f"{name} {config.model} n={config.batch_size} keep={config.keep} {arm}"


def measure(
    configs: Mapping[str, RunConfig],
    data: Dataset,
    *,
    rounds: int = ROUNDS,
    clock: Callable[[], float] = time.process_time,
    threads: int = 1,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Cost]:
    """The cost of a step of each of ``configs``, which train as they are measured; ``advance`` hears of each round."""
    keep_freed_memory()
    with thread_limit(threads):
        runs = {}
        for name, config in configs.items():
            try:
                runs[name] = Run(replace(config, steps=10_000, warmup=0.002), data, Path(), clock)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in runs}
        reads: dict[str, dict[str, list[float]]] = {name: {"read": [], "read kept": []} for name in runs}
        for turn in range(-1, rounds):
            for name, run in runs.items():
                for step in range(WARM if turn < 0 else BLOCK):
                    run.train_step()
                    if turn >= 0 and step > 0:
                        rows[name].append(run.newest().clone())
                        kept = step % 2 == 0
                        reads[name]["read kept" if kept else "read"].append(_reading(run, kept))
            advance()
    costs = {}
    for name, measured in rows.items():
        phases = dict(zip(PHASES, (1e3 * typical(torch.stack(measured))).tolist(), strict=True))
        low, _, high = statistics.quantiles([1e3 * float(row[TOTAL]) for row in measured], n=4, method="inclusive")
        phases |= {phase: 1e3 * statistics.median(times) for phase, times in reads[name].items()}
        order = runs[name].order
        if isinstance(order, SampledOrder):
            phases[ONCE] = 1e3 * order.proxy_seconds
        costs[name] = Cost(phases.pop("total"), low, high, phases)
    return costs


def _reading(run: Run, kept: bool) -> float:
    """Seconds to read the next minibatch, or as many of its samples as run backward."""
    started = run.clock()
    indices = run.order.elsewhere(run.step).to(run.device)
    run.train.batch(indices[: run.config.kept()] if kept else indices)
    return run.clock() - started


def wrong_costs(content: dict[str, Any]) -> str | None:
    """What is wrong with a file of costs; None where nothing is."""
    machine_, costs = content.get("machine"), content.get("costs")
    if not isinstance(machine_, dict) or not all(isinstance(value, str) for value in machine_.values()):
        return f"machine must be an object of texts, got {short(machine_)}"
    if not isinstance(costs, dict):
        return f"costs must be an object, got {short(costs)}"
    for name, cost in costs.items():
        good = isinstance(cost, dict) and set(cost) == {field.name for field in fields(Cost)}
        times = [cost["median"], cost["low"], cost["high"]] if good else []
        phases = list(cost["phases"].values()) if good and isinstance(cost["phases"], dict) else [None]
        if not times or not all(map(is_number, times + phases)) or min(times) <= 0:
            return f"the cost of {short(name)} must be positive numbers and its phases', got {short(cost)}"
    return None


class Costs:
    """The measured costs of a study, kept in ``path``. A cost that is in the file is not measured again.

    Costs that a later session adds are rescaled so that the steps which both sessions measured agree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.costs: dict[str, Cost] = {}
        self.machine: dict[str, str] = {}
        content = read_object(path)
        if content is not None:
            checked(path, content, wrong_costs)
            self.machine = content["machine"]
            self.costs = {name: Cost(**cost) for name, cost in content["costs"].items()}

    def __getitem__(self, config: RunConfig) -> Cost:
        return self.costs[cost_name(config)]

    def add(self, configs: list[RunConfig], measured: Callable[[Mapping[str, RunConfig]], dict[str, Cost]]) -> None:
        """Have the costs of ``configs`` (of one data set and model) by calling ``measured`` for what is missing."""
        wanted = {cost_name(config): config for config in configs}
        missing = {name: config for name, config in wanted.items() if name not in self.costs}
        if not missing:
            return
        anchors = {name: config for name, config in wanted.items() if name in self.costs}
        found = measured({**missing, **anchors})
        scale = statistics.median(self.costs[name].median / found[name].median for name in anchors) if anchors else 1.0
        for name in missing:
            cost = found[name]
            self.costs[name] = Cost(
                cost.median * scale,
                cost.low * scale,
                cost.high * scale,
                {phase: value * scale for phase, value in cost.phases.items()},
            )
        self.machine = self.machine or machine()
        costs = {name: asdict(cost) for name, cost in self.costs.items()}
        write_text(self.path, json.dumps({"machine": self.machine, "costs": costs}, indent=1) + "\n")


def steps_of(
    budget: str,
    base: RunConfig,
    config: RunConfig,
    costs: Costs | None,
    milliseconds: float,
    share: float | None = None,
) -> int:
    """How many steps ``share`` of a budget, all of it for None, gives ``config`` where ``base`` gets its own number.

    "time" reads costs and milliseconds.
    """
    share = 1.0 if share is None else share
    if budget == "time" and costs is not None:
        return steps_within(share * milliseconds, costs[config])
    return max(1, round(share * base.steps * (base.kept() / config.kept() if budget == "samples" else 1)))


def steps_within(milliseconds: float, cost: Cost) -> int:
    """Whole steps of ``cost`` that fit in a budget of time, beside what is paid once; at least one."""
    return max(1, int((milliseconds - cost.phases.get(ONCE, 0.0)) / cost.median + 1e-9))
