"""A small language model from nothing to fine-tuned, on text of this machine; rules compared at equal time.

A tokenizer and a Llama of 2 million parameters learn Debian's documentation. Then the model is fine-tuned on the
docstrings of Python's library, of which 30 % are junk: shuffled tokens, another language, and three docstrings over and
over. Every arm has the same processor seconds. What counts is the loss on docstrings of other files, without junk.

``python examples/llm/run.py`` takes about six minutes of processor time, ``--quick`` some seconds. It needs
Transformers and its tokenizers, and downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import KINDS, Samples, docstrings, documents, encoded, trained_tokenizer, with_junk
from report import markdown, plot, publish
from torch import Tensor, nn

import selbp

ARMS: dict[str, Callable[[], dict[str, Any]]] = {
    "full": lambda: {"selector": selbp.Full()},
    "random": lambda: {"selector": selbp.Random()},
    "top loss by the token": lambda: {"selector": selbp.TopLoss(normalize="tokens")},
    "matching, sketched": lambda: {"selector": selbp.GradientMatching(), "proxy": "sketch"},
}


@dataclass(frozen=True)
class Setup:
    """What a run does, and how much of it."""

    vocabulary: int = 4096
    width: int = 128
    layers: int = 4
    length: int = 64
    rows: int = 32
    keep: float = 0.25
    junk: float = 0.3
    characters: int = 4_000_000  # of documentation
    files: int = 2000  # of Python's library
    held_out: int = 256  # samples that are evaluated
    steps: int = 250  # of pre-training
    seconds: float = 20.0  # of each arm, processor time
    points: int = 5  # evaluations of each arm
    seeds: int = 3


QUICK = Setup(512, 32, 1, 32, 16, 0.25, 0.3, 60_000, 60, 32, 5, 0.4, 2, 1)


@dataclass
class Arm:
    """One way to choose, on its way."""

    name: str
    model: nn.Module
    batches: Iterator[dict[str, Tensor]]
    optimizer: torch.optim.Optimizer
    step: selbp.SelectiveBackprop
    seconds: float = 0.0
    steps: int = 0
    chosen: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    curve: list[tuple[float, int, float]] = field(default_factory=list)  # seconds, steps, loss


def language_model(setup: Setup) -> nn.Module:
    """A Llama of these sizes, with random weights."""
    heads = max(2, setup.width // 32)
    config = transformers.LlamaConfig(
        vocab_size=setup.vocabulary,
        hidden_size=setup.width,
        intermediate_size=3 * setup.width,
        num_hidden_layers=setup.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=setup.length,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def minibatches(samples: Samples, rows: int, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Epochs without end, in an order of their own: the rows' numbers, and the batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(samples.ids), generator=generator)
        for part in order.split(rows):
            if len(part) == rows:
                yield part, samples.batch(part)


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> float:
    """Mean loss by the token."""
    model.eval()
    total, count = 0.0, 0
    for part in torch.arange(len(samples.ids)).split(32):
        batch = samples.batch(part)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum")
        total, count = total + float(losses), count + int((labels[:, 1:] != -100).sum())
    model.train()
    return total / count


def pre_train(model: nn.Module, samples: Samples, setup: Setup, seed: int) -> float:
    """Train on every row for a number of steps; returns the processor seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss="linear_causal_lm")
    batches, begun = minibatches(samples, setup.rows, seed), time.process_time()
    for i in range(setup.steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (i + 1) / 20) * (1 - i / setup.steps)
        train(step, optimizer, next(batches)[1])
    return time.process_time() - begun


def train(step: selbp.SelectiveBackprop, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One step."""
    step(batch).backward()
    nn.utils.clip_grad_norm_(step.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def advance(arm: Arm, samples: Samples, until: float) -> None:
    """Train one arm until it has had its processor seconds."""
    while arm.seconds < until:
        rows, batch = next(arm.batches)
        begun = time.process_time()
        train(arm.step, arm.optimizer, batch)
        arm.seconds += time.process_time() - begun
        arm.steps += 1
        selection = arm.step.report.selection
        kinds = samples.kinds[rows[selection.indices]]
        weights = selection.weights / selection.weights.sum().clamp(min=1e-12)
        for kind in range(len(KINDS)):
            arm.chosen[kind] += float(weights[kinds == kind].sum())


def fine_tune(model: nn.Module, samples: Samples, held_out: Samples, setup: Setup, seed: int) -> list[Arm]:
    """All arms from the same model, in turn, a slice of their time each."""
    arms = []
    for name, options in ARMS.items():
        torch.manual_seed(seed)
        copied = copy.deepcopy(model)
        keep = 1.0 if name == "full" else setup.keep
        generator = torch.Generator().manual_seed(seed)
        step = selbp.SelectiveBackprop(copied, keep=keep, loss="linear_causal_lm", generator=generator, **options())
        optimizer = torch.optim.AdamW(copied.parameters(), lr=5e-4)
        batches = minibatches(samples, setup.rows, seed + 1)
        arms.append(Arm(name, copied, batches, optimizer, step, curve=[(0.0, 0, evaluate(copied, held_out))]))
    for point in range(1, setup.points + 1):
        for arm in arms:
            advance(arm, samples, setup.seconds * point / setup.points)
            arm.curve.append((arm.seconds, arm.steps, evaluate(arm.model, held_out)))
        said = ", ".join(f"{arm.name} {arm.curve[-1][2]:.3f}" for arm in arms)
        print(f"seed {seed}, {setup.seconds * point / setup.points:.0f} s an arm: {said}", flush=True)
    return arms


def run(setup: Setup, seed: int) -> dict[str, Any]:
    """The whole recipe; returns what the result file holds."""
    texts, (train_texts, held_out_texts) = documents(setup.characters), docstrings(setup.files)
    tokenizer = trained_tokenizer(texts + train_texts, setup.vocabulary)
    pages = encoded(tokenizer, texts, setup.length)
    held_out = encoded(tokenizer, held_out_texts[: setup.held_out], setup.length)
    torch.manual_seed(seed)
    model = language_model(setup)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(texts)} paragraphs, {len(train_texts)} docstrings, {parameters / 1e6:.2f} M parameters", flush=True)
    before, seconds = evaluate(model, held_out), pre_train(model, pages, setup, seed)
    print(f"pre-trained in {seconds:.0f} s: {before:.3f} -> {evaluate(model, held_out):.3f} on docstrings", flush=True)
    arms = []
    for at in range(seed, seed + setup.seeds):
        samples = with_junk(tokenizer, train_texts, setup.length, setup.junk, at)
        for arm in fine_tune(model, samples, held_out, setup, at):
            chosen = {kind: share / max(arm.steps, 1) for kind, share in zip(KINDS, arm.chosen, strict=True)}
            way = {"backward": arm.step.report.backward, "why": arm.step.report.backward_reason}
            arms.append({"arm": arm.name, "seed": at, "steps": arm.steps, "curve": arm.curve, "chosen": chosen, **way})
    return {
        "setup": vars(setup),
        "seed": seed,
        "parameters": parameters,
        "paragraphs": len(texts),
        "docstrings": len(train_texts),
        "evaluated": len(held_out.ids),
        "pre_training_seconds": seconds,
        "arms": arms,
        **{package.__name__: package.__version__ for package in (torch, transformers, selbp)},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe and write its results."""
    parse = argparse.ArgumentParser("examples/llm/run.py", description=__doc__)
    parse.add_argument("--quick", action="store_true", help="a tiny model and hardly any training, to see it run")
    parse.add_argument("--seed", type=int, default=0, help="of weights, orders and junk; the first of several (0)")
    parse.add_argument("--seeds", type=int, help=f"fine-tunings ({Setup.seeds})")
    parse.add_argument("--seconds", type=float, help=f"processor seconds of each arm ({Setup.seconds:.0f})")
    parse.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parse.add_argument("--out", type=Path, help="folder for llm.json, llm.md and llm.svg")
    parse.add_argument("--publish", action="store_true", help="write them to benchmarks/results, and the docs' page")
    options = parse.parse_args(arguments)
    if options.threads < 1 or (options.seeds or 1) < 1 or not (options.seconds or 1) > 0:
        parse.error("--threads, --seeds and --seconds must be positive")
    if options.publish and options.quick:
        parse.error("--publish is for a whole run: it does not go with --quick")
    torch.set_num_threads(options.threads)
    setup = QUICK if options.quick else Setup()
    changed = {"seeds": options.seeds, "seconds": options.seconds}
    setup = Setup(**{**vars(setup), **{name: value for name, value in changed.items() if value is not None}})
    try:
        result = run(setup, options.seed)
    except FileNotFoundError as error:
        print(f"llm: {error}", file=sys.stderr)
        return 2
    table = markdown(result)
    print(table)
    if options.publish:
        publish(result)
    elif options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "llm.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "llm.md").write_text(table)
        (options.out / "llm.svg").write_text(plot(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
