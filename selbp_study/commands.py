"""What the commands do, once their arguments are read (:mod:`selbp_study.cli`)."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from selbp_study.arms import Arm, build_selector, keep_for, parse
from selbp_study.compare import Comparison, lost_runs, run_all, tune
from selbp_study.config import RunConfig
from selbp_study.costs import Costs, measure
from selbp_study.data import DataError, Dataset, load
from selbp_study.folder import read_config, read_result
from selbp_study.models import build_model, model_for
from selbp_study.run import Diverged, Run
from selbp_study.sampled import SampledOrder
from selbp_study.show import Bar, Show, say
from selbp_study.storage import Lock, LockedError, StorageError, write_text
from selbp_study.timing import CLOCKS, clock_for, wrapper_of
from selbp_study.together import SharedRun, Together, starts

DEMO_ARMS = ("full", "random", "top-loss", "loss-percentile", "gradnorm", "matching", "auto")
DEFAULT_EPOCHS = 4.0
DIGITS_EPOCHS = 40.0  # 440 steps, seconds each run: 4 epochs are 44 steps, after which no network has learned much
DEMO_EPOCHS = 3.0  # twenty-one runs in 7 to 15 minutes on two cores
OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class UsageError(Exception):
    """Bad input; the message is the one line that the user sees."""


EXPECTED = (UsageError, ValueError, DataError, StorageError, Diverged, NotImplementedError, OSError)


def status_of(error: Exception) -> int:
    """Exit status of an expected error: 1 where the run failed, 2 where it was asked for wrongly."""
    return FAILED if isinstance(error, (Diverged, OSError, LockedError)) else BAD_INPUT


# ------------------------------------------------------------------------------------------------------ shared


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


def require_plots() -> None:
    """UsageError where the plots cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('the plots need matplotlib: pip install "selbp[study]"')


@contextmanager
def asked_by(option: str) -> Iterator[None]:
    """What is wrong with an option's value names the option too."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"{option}: {error}") from error


def _load(arguments: argparse.Namespace, *, fallback: bool = False) -> Dataset:
    _check_device(arguments.device)
    try:
        return load(arguments.dataset, arguments.data, fallback=fallback, say=say)
    except DataError as error:
        raise DataError(f"{error}" if arguments.dataset == "digits" else f"{error}, or use --dataset digits") from error


def _base(arguments: argparse.Namespace, data: Dataset, selector: str, lr: float, seed: int) -> RunConfig:
    """The configuration that the arguments describe; what was not given keeps its default."""
    batch_size = 128 if arguments.batch_size is None else arguments.batch_size
    if not 1 <= batch_size <= len(data.train):
        raise UsageError(f"--batch-size must lie in 1..{len(data.train)}, the training samples, got {batch_size}")
    steps = arguments.steps
    if steps is None:
        default = DEMO_EPOCHS if getattr(arguments, "preset", None) == "demo" else DEFAULT_EPOCHS
        default = DIGITS_EPOCHS if data.name == "digits" else default
        epochs = default if arguments.epochs is None else arguments.epochs
        steps = max(1, round(epochs * (len(data.train) // batch_size)))
    given = {
        name: getattr(arguments, name)
        for name in ("model", "backward", "scoring", "head_gradient", "evaluate_every")
        if getattr(arguments, name) is not None
    }
    keep = keep_for(selector, 0.25 if arguments.keep is None else arguments.keep)
    config = RunConfig(
        dataset=data.name,
        fingerprint=data.fingerprint,
        selector=selector,
        steps=steps,
        lr=lr,
        keep=keep,
        seed=seed,
        batch_size=batch_size,
        device=arguments.device,
        threads=arguments.threads,
        **{"model": model_for(data.train), "evaluate_every": max(1, math.ceil(steps / 10)), **given},
    )
    return config


def _folder_of(name: str, *settings: object) -> Path:
    """Where a command keeps its files if no --out says so: a folder for each of the ``settings``."""
    return Path("runs") / f"{name}-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------------- train


def train(arguments: argparse.Namespace) -> int:
    """``selbp train``."""
    with asked_by(f"--selector {arguments.selector}"):
        arm = Arm.parse(arguments.selector)
        build_selector(arm.selector)
    with Together(arguments.device) as together:
        return _train(arguments, arm, together)


def _train(arguments: argparse.Namespace, arm: Arm, together: Together) -> int:
    tell = say if together.leads else _keep_quiet
    data = together.in_turn(lambda: _load(arguments))
    lr = arm.rate() if arguments.lr is None else arguments.lr
    base = _base(arguments, data, arm.selector, lr, arguments.seed)
    own = replace(arm, lr=lr) if arguments.keep is None else replace(arm, lr=lr, keep=arguments.keep)
    config = Comparison(base, [own], [arguments.seed]).config(own, arguments.seed)  # an arm's share of the steps, too
    with asked_by(f"--selector {arguments.selector}"):
        _check_run(config, data, arguments.keep)
    name = "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in arguments.selector)
    folder = arguments.out or _folder_of(f"{data.name}-{name}-seed{arguments.seed}", config.key())
    before = together.share(lambda: read_config(folder))
    resume = arguments.resume or starts() > 0
    if before is not None and before != config:
        raise UsageError(
            f"{folder} holds another run: {'; '.join(before.differences(config))}. Another --out starts a new one"
        )
    if before is not None and not resume:
        raise UsageError(f"{folder} holds a run already: --resume goes on with it, another --out starts a new one")
    if before is None and resume:
        others = [] if arguments.out else sorted(map(str, folder.parent.glob(f"{folder.name[:-8]}????????")))
        told = f"; with other settings there are {', '.join(others)}" if others else ""
        tell(f"{folder} holds no run yet: starting one{told}")
    result = together.share(lambda: read_result(folder))
    if result is not None:
        tell(f"{folder} is finished")
    else:
        run = Run(config, data, folder) if together.size == 1 else SharedRun(config, data, folder, together)
        done = run.open()
        among = "" if together.size == 1 else f", shared by {together.size} processes"
        tell(
            f"{'going on at step ' + str(done) if done else 'training'} in {folder}: {config.steps} "
            f"{'' if config.steps == base.steps else f'of {base.steps} '}steps, {_per_step(run)}{among}"
        )
        bar = Bar(arguments.selector, arguments.quiet or not together.leads).add(config, done)
        try:
            result = run.execute(bar)
        except KeyboardInterrupt:
            bar.close()
            tell(f"stopped after step {run.step} of {config.steps}; the same command with --resume goes on from there")
            return INTERRUPTED
        finally:
            bar.close()
        _write_scores(run, data)
    seconds = result["seconds"]
    processor = "processor " if result.get("clock") == "process" else ""
    tell(
        f"test accuracy {result['accuracy']:.2f} %, {result['backward_samples']} backward samples, "
        f"{processor}seconds: forward {seconds['score'] + seconds['forward']:.1f}, select {seconds['select']:.1f}, "
        f"backward {seconds['backward']:.1f}, total {seconds['total']:.1f}"
    )
    tell(f"log {folder / 'log.jsonl'}, weights {folder / 'model.pt'}, result {folder / 'result.json'}")
    return OK


def _check_run(config: RunConfig, data: Dataset, keep: float | int | None) -> None:
    """Refuse a run's arguments before its folder is looked at or a proxy trained. ``keep`` is what --keep gave."""
    if isinstance(keep, int) and keep > config.batch_size:
        raise UsageError(f"--keep must be at most the minibatch's {config.batch_size} samples, got {keep}")
    with asked_by(f"--model {config.model}"):
        model = build_model(config.model, data.train, data.n_classes, config.seed)
    wrapper_of(config, model, torch.Generator())


def _per_step(run: Run) -> str:
    """What a step reads and runs backward."""
    k, order = run.config.kept(), run.order
    if not isinstance(order, SampledOrder):
        return f"{k} of {run.config.batch_size} samples run backward"
    if order.options.sampling == "rho":  # the pool runs forward, and the rule chooses
        return f"{k} of {order.pool} samples run backward"
    return f"{k} samples run backward" + (f", drawn from pools of {order.pool}" if order.pool > k else "")


def _keep_quiet(text: str) -> None:
    """Print nothing: of several processes, the first one prints for all."""


def _write_scores(run: Run, data: Dataset) -> None:
    """What a table of scores learned, where the run had one."""
    if isinstance(run.order, SampledOrder) and run.order.table.classes is not None:
        from selbp_study.suspects import write

        plots = importlib.util.find_spec("matplotlib") is not None
        written = write(run.folder, run.order.table, data, run.log.read(), with_page=plots)
        say(f"samples thought mislabelled: {', '.join(map(str, written))}")


# ----------------------------------------------------------------------------------------------------- compare


def _timed(comparison: Comparison, data: Dataset, folder: Path) -> Comparison:
    """The comparison at equal time: each arm's step is measured first, alone, in turn with the others'."""
    base = comparison.base
    configs = [arm.config(base, 0) for arm in comparison.arms]
    clock = CLOCKS[clock_for(base.device)]
    costs = Costs(folder / f"costs-{base.device}-{base.threads}.json")
    say("measuring a step of each arm ...")
    costs.add(configs, lambda wanted: measure(wanted, data, clock=clock, threads=base.threads))
    for arm, config in zip(comparison.arms, configs, strict=True):
        say(f"  {arm.label}: {costs[config].median:.2f} ms a step")
    return comparison.timed(costs)


def compare(arguments: argparse.Namespace) -> int:
    """``selbp compare``."""
    require_plots()
    demo = arguments.preset == "demo"
    names = arguments.arms or list(DEMO_ARMS)
    arms = []
    for name in names:
        with asked_by(f"--arms {name}"):
            arm = Arm.parse(name)
            build_selector(arm.selector)
            arms.append(arm if arguments.lr is None else replace(arm, lr=arguments.lr))
    data = _load(arguments, fallback=demo)
    base = _base(arguments, data, arms[0].selector, parse(arms[0].selector)[0].lr, 0)  # each arm sets its own rate
    base = replace(base, keep=0.25 if arguments.keep is None else arguments.keep)
    for name, arm in zip(names, arms, strict=True):
        with asked_by(f"--arms {name}"):
            config = arm.config(base, 0)
            _check_run(config, data, arguments.keep if arm.keep is None else None)
            Run(config, data, Path())  # its training options, before any arm trains
    timed = arguments.budget == "time"
    comparison = Comparison(base, arms, arguments.seeds or [0, 1, 2], "steps" if timed else arguments.budget)
    undecided = [*(["lr"] if arguments.tune else []), *(["steps", "evaluate_every"] if timed else [])]
    folder = arguments.out
    if folder is None:  # named by what all arms and seeds share, so that more of them go on there
        name = f"{'demo' if demo else 'compare'}-{data.name}-{base.model}"
        shared = replace(base, selector="", lr=1.0).key()
        settings = shared, arguments.budget, arguments.lr, sorted(arguments.tune or ())
        folder = _folder_of(name, *settings)
        if lost_runs(comparison, folder, undecided):  # others than those have one of their own
            folder = _folder_of(name, *settings, sorted(names), sorted(comparison.seeds))
    folder.mkdir(parents=True, exist_ok=True)
    with Lock(folder):
        _keep_report(comparison, folder, undecided)  # before anything is measured or tuned
        say(f"in {folder}: {', '.join(names)}; seeds {', '.join(map(str, comparison.seeds))}")
        if timed:
            comparison = _timed(comparison, data, folder)
            _keep_report(comparison, folder, ["lr"] if arguments.tune else [])
        return _compare(comparison, data, folder, arguments)


def _keep_report(comparison: Comparison, folder: Path, undecided: Sequence[str] = ()) -> None:
    """UsageError where the report of ``comparison`` would take the place of one with other runs."""
    lost = lost_runs(comparison, folder, undecided)
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UsageError(
            f"{folder} holds another comparison, with runs that this one lacks: {lost[0]}{more}. Another --out starts "
            "a new one; the same settings, with as many or more arms and seeds, go on with it"
        )


def _compare(comparison: Comparison, data: Dataset, folder: Path, arguments: argparse.Namespace) -> int:
    """Tune where that is asked for, run, and write the report; the folder is this process's."""
    from selbp_study.report import write_report

    command = "selbp " + shlex.join(sys.argv[1:])
    show = Show(comparison, arguments.quiet)
    try:
        if arguments.tune:
            comparison, scores = tune(comparison, arguments.tune, data, folder, progress=show.progress)
            show.close()
            _keep_report(comparison, folder)
            write_text(folder / "tuning.json", json.dumps(scores, indent=1) + "\n")
            for arm in comparison.arms:
                tried = ", ".join(f"{rate:g}: {score:.2f} %" for rate, score in scores[arm.name].items())
                say(f"{arm.label}: rate {arm.rate():g} (held-out accuracy by rate: {tried})")
        outcomes = run_all(comparison, data, folder, progress=show.progress, finished=show.finished)
    except KeyboardInterrupt:
        outcomes = show.outcomes
        if outcomes:
            write_report(comparison, data, outcomes, folder, command)
        say(f"\nstopped with {len(outcomes)} runs finished; the same command goes on from the steps in flight")
        return INTERRUPTED
    finally:
        show.close()
    report, table = write_report(comparison, data, outcomes, folder, command)
    say(f"\n{table}\n\npage: {report.resolve()}")
    say("also: table.md, results.jsonl, samples.png, seconds.png, time.png there")
    return FAILED if any(outcome.result is None for outcome in outcomes) else OK


# ------------------------------------------------------------------------------------------------------- bench


def bench(arguments: argparse.Namespace, rest: list[str]) -> int:
    """``selbp bench``: the suite lives beside the package in a source checkout, not in the package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks").is_dir():
        raise UsageError(
            "the benchmarks are part of a source checkout, which this installation is not: clone the project and run "
            "`make bench` there"
        )
    command = [sys.executable, "-m", "benchmarks", *rest]
    for name in ("seed", "out"):
        value = getattr(arguments, name)
        if value is not None:
            command += [f"--{name}", str(value.resolve() if isinstance(value, Path) else value)]
    return subprocess.run(command, cwd=root).returncode
