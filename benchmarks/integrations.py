"""``python -m benchmarks integrations``: what a selective step is in each framework, and what it costs there.

A tiny Llama is trained for some steps in the loop of each framework, by the framework itself and by each rule. *Right
to* is the largest relative difference, over parameters, between the gradient that the optimizer was given and that of
the same rows and weights by hand, in float64. Times are processor seconds of whole steps in float32, optimizer and all,
the median over rounds in which all cases take turns, over those of the framework without selection. Memory is the
greatest rise while it trains, in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import selbp
from benchmarks.frameworks import FRAMEWORKS
from selbp_study.memory import RETURN_FREED, rise

RESULTS = Path(__file__).parent / "results"
ROWS, LENGTH, KEEP, WARM = 16, 64, 0.25, 2
ARMS: dict[str, Any] = {
    "full": None,
    "random": {"selector": selbp.Random()},
    "top loss, rows": {"selector": selbp.TopLoss(normalize="tokens"), "backward": "rows"},
    "top loss, recompute": {"selector": selbp.TopLoss(normalize="tokens"), "backward": "recompute"},
    "matching sketched, rows": {"selector": selbp.GradientMatching(), "proxy": "sketch", "backward": "rows"},
    "matching sketched, recompute": {"selector": selbp.GradientMatching(), "proxy": "sketch", "backward": "recompute"},
}
Case = tuple[str, str]


def options_of(arm: str) -> dict[str, Any] | None:
    """The step's options, None for a framework without one."""
    return None if ARMS[arm] is None else {"keep": KEEP, "loss": "causal_lm", **ARMS[arm]}


def llama(small: bool) -> Any:
    """Of random weights, the same in each call."""
    import transformers

    torch.manual_seed(0)
    width, layers, vocabulary = (16, 2, 64) if small else (128, 4, 2048)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).train()


def samples(n: int, vocabulary: int, length: int) -> dict[str, Tensor]:
    """Sequences of lengths from a half to the whole, the first token of which is no target."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary, (n, length), generator=generator)
    lengths = length - torch.arange(n) * 7 % (length // 2)
    mask = (torch.arange(length) < lengths[:, None]).long()
    labels = torch.where(mask == 1, ids, -100)
    labels[:, 0] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def missing() -> dict[str, str]:
    """What each framework lacks here."""
    lacks = {}
    for name, (_, packages) in FRAMEWORKS.items():
        absent = [package for package in ("transformers", *packages) if importlib.util.find_spec(package) is None]
        if absent:
            lacks[name] = f"not installed: {', '.join(absent)}"
    return lacks


def deviation(case: Case) -> float:
    """Largest relative difference of a step's gradient to that by hand."""
    framework, arm = case
    model, rows = llama(small=True).double(), samples(ROWS, 64, 12)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[dict[str, Tensor]] = []
    call = selbp.SelectiveBackprop.__call__

    def tapped(step: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        seen.append({name: inputs[name].clone() for name in rows})
        return call(step, inputs, *rest, **named)

    torch.manual_seed(5)
    with mock.patch.object(selbp.SelectiveBackprop, "__call__", tapped):
        step = FRAMEWORKS[framework][0](model, rows, ROWS, 1.0, options_of(arm), _nothing, _nothing)
    got = {name: before[name] - p.detach() for name, p in model.named_parameters()}
    weights = torch.ones(ROWS, dtype=torch.float64) / ROWS
    batch, indices = rows, torch.arange(ROWS)
    if step is not None:
        batch, (indices, weights) = seen[-1], step.report.selection
    reference = llama(small=True).double()
    logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) * ROWS / (labels != -100).sum()
    (losses[indices] * weights).sum().backward()
    pairs = [(got[name], p.grad) for name, p in reference.named_parameters()]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _nothing() -> None:
    """Nothing is timed."""


def seconds(case: Case, steps: int) -> list[float]:
    """Processor seconds of each step but the first few."""
    framework, arm = case
    model, rows = llama(small=False), samples(ROWS * (steps + WARM), 2048, LENGTH)
    begun: list[float] = []
    spent: list[float] = []
    torch.manual_seed(5)
    FRAMEWORKS[framework][0](
        model,
        rows,
        ROWS,
        1e-3,
        options_of(arm),
        lambda: begun.append(time.process_time()),
        lambda: spent.append(time.process_time() - begun[-1]),
    )
    return spent[WARM:]


def peaks(cases: Sequence[Case]) -> dict[str, int]:
    """Bytes by which the resident set rises over a training of three steps."""
    found: dict[str, int] = {}
    warm: set[str] = set()
    for case in cases:
        if case[0] not in warm:
            seconds(case, 1)  # and with it what is imported and made once
            warm.add(case[0])
        found["/".join(case)] = rise(lambda case=case: seconds(case, 1))  # type: ignore[misc]
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Frameworks' notes are left out."""
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def measure(cases: Sequence[Case], rounds: int, steps: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each case."""
    right = {case: deviation(case) for case in cases}
    say("compared; now timing")
    times: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(rounds):
        for case in cases:
            times[case] += seconds(case, steps)
        say(f"round {turn + 1} of {rounds}")
    say("now memory")
    return table(cases, right, {case: statistics.median(found) for case, found in times.items()}, measured_peaks(cases))


def measured_peaks(cases: Sequence[Case]) -> dict[str, int]:
    """:func:`peaks` in a process of its own; empty where it fails."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.integrations", json.dumps(cases)],
        env={**os.environ, **RETURN_FREED},
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    found: dict[str, int] = json.loads(child.stdout.splitlines()[-1]) if child.returncode == 0 else {}
    return found


def table(
    cases: Sequence[Case], right: dict[Case, float], medians: dict[Case, float], memory: dict[str, int]
) -> list[dict[str, Any]]:
    """The rows, with times and memory over those of the framework by itself."""
    rows = []
    for case in cases:
        full = (case[0], "full")
        median, base = medians[case], medians[full]
        peak, whole = memory.get("/".join(case)), memory.get("/".join(full))
        rows.append(
            {
                "framework": case[0],
                "arm": case[1],
                "right to": right[case],
                "milliseconds": 1e3 * median,
                "time over full": median / base,
                "megabytes": None if peak is None else peak / 1e6,
                "memory over full": peak / whole if peak is not None and whole else None,
            }
        )
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    about = result["about"]
    lines = [
        f"Llama of 4 layers, width 128, vocabulary 2048; {ROWS} sequences of up to {LENGTH} tokens a step, {KEEP:.0%} "
        f"of them kept; {about['rounds']} rounds of {about['steps']} steps. "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['threads']} thread.",
        "",
        "| loop | rule | right to | ms a step | time over full | peak, MB | memory over full |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        peak, share = row["megabytes"], row["memory over full"]
        lines.append(
            f"| {row['framework']} | {row['arm']} | {row['right to']:.0e} | {row['milliseconds']:.0f} | "
            f"{row['time over full']:.2f} | {'–' if peak is None else f'{peak:.0f}'} | "
            f"{'–' if share is None else f'{share:.2f}'} |"
        )
    lines += [f"| {name} | {why} | | | | | |" for name, why in result["missing"].items()]
    return "\n".join(lines) + "\n"


def versions() -> dict[str, str]:
    """Of what took part."""
    from importlib import metadata

    names = ("torch", "transformers", "trl", "accelerate", "lightning")
    found = {name: metadata.version(name) for name in names if importlib.util.find_spec(name) is not None}
    return {"selbp": selbp.__version__, "python": platform.python_version(), **found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and write it where asked."""
    parse = argparse.ArgumentParser("python -m benchmarks integrations", description=__doc__)
    parse.add_argument("--quick", action="store_true", help="one round of two steps")
    parse.add_argument("--filter", default="", metavar="TEXT", help="only loops whose name contains TEXT")
    parse.add_argument("--rounds", type=int, default=3, help="in which all cases take turns (3)")
    parse.add_argument("--steps", type=int, default=3, help="that are timed in each round (3)")
    parse.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parse.add_argument("--out", type=Path, metavar="DIR", help="write integrations.json and .md there")
    parse.add_argument("--publish", action="store_true", help="write them to benchmarks/results")
    options = parse.parse_args(arguments)
    if min(options.rounds, options.steps, options.threads) < 1:
        parse.error("--rounds, --steps and --threads must be positive")
    if options.publish and (options.quick or options.filter):
        parse.error("--publish is for a whole run: it goes with neither --quick nor --filter")
    torch.set_num_threads(options.threads)
    lacks = missing()
    names = [name for name in FRAMEWORKS if options.filter in name and name not in lacks]
    rounds, steps = (1, 2) if options.quick else (options.rounds, options.steps)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with quiet():
        rows = measure([(name, arm) for name in names for arm in ARMS], rounds, steps, say)
    about = {"rounds": rounds, "steps": steps, "threads": options.threads, "versions": versions()}
    result = {"about": about, "rows": rows, "missing": lacks}
    print(markdown(result))
    if options.publish and any(row["memory over full"] is None for row in rows):
        say("not published: the process that measures memory has failed")
        return 1
    folder = RESULTS if options.publish else options.out
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "integrations.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / "integrations.md").write_text(markdown(result))
    return 0


if __name__ == "__main__":
    with quiet():
        torch.set_num_threads(1)
        print("\n" + json.dumps(peaks([tuple(case) for case in json.loads(sys.argv[1])])))
