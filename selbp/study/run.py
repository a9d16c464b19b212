"""One training run: the loop, its log, and a state that is whole after every step.

The evaluation split is read by :func:`evaluate` and by nothing else; nothing that it returns flows back into training.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selbp.data import Dataset, Split
from selbp.study.arms import build_selector, options_of
from selbp.study.config import RunConfig
from selbp.study.models import HEAD, build_model, place_of
from selbp.study.storage import Journal, JsonLines, StorageError, write_text
from selbp.training import Schedule, SelectiveBackprop

PHASES = ("score", "select", "forward", "backward", "optimizer", "total")
WINDOW = 50  # steps a log row sums up


class Diverged(Exception):
    """The loss is no longer finite: the run cannot go on."""


def evaluate(model: nn.Module, split: Split, device: torch.device, rows: int = 250) -> tuple[float, float]:
    """Accuracy in per cent and mean loss over all labels of ``split``; the model's mode is put back.

    Logits are (n, C) for labels (n,), or (n, T, C) for a text's (n, T): then it is the next character's accuracy.
    """
    training = model.training
    model.eval()
    correct, loss, labels = 0, 0.0, split.labels.numel()
    with torch.no_grad():
        for part in torch.arange(len(split), device=device).split(rows):
            inputs, target = split.batch(part)
            logits, target = model(inputs).flatten(0, -2), target.flatten()
            correct += int((logits.argmax(1) == target).sum())
            loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
    model.train(training)
    return 100.0 * correct / labels, loss / labels


class Order:
    """Which samples step t reads: a fresh permutation each epoch, drawn from (seed, epoch) alone.

    The position in the data is a function of the step, so a resumed run needs no more than its number. The last,
    incomplete batch of an epoch is dropped.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if batch_size > n:
            raise ValueError(f"batch_size must be at most the {n} training samples, got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.per_epoch = n // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64 sample numbers of step ``step``."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


def wrapper_of(config: RunConfig, model: nn.Module, generator: torch.Generator) -> SelectiveBackprop:
    """The training step that ``config`` describes. ValueError for options that do not exist or do not go together."""
    options: dict[str, Any] = {"keep": config.keep, "backward": config.backward, "scoring": config.scoring}
    options |= {"head_gradient": config.head_gradient, **options_of(config.options)}
    options |= {"cut": place_of(config.model, config.cut)} if config.cut else {"head": HEAD}
    schedule = {name: options.pop(name) for name in ("start", "end", "every", "between") if name in options}
    try:
        options["schedule"] = Schedule(**schedule)
        return SelectiveBackprop(model, selector=build_selector(config.selector), generator=generator, **options)
    except TypeError as error:
        raise ValueError(f"training options {config.options!r}: {error}") from error


def typical(steps: Tensor) -> Tensor:
    """(len(PHASES),) seconds of a step: the medians of the (m, len(PHASES) + 1) rows of a window.

    Where the rule chose on some steps only (the last column), the two kinds' medians, weighted by how many they are.
    """
    chose = steps[:, -1] > 0
    kinds = [kind[:, :-1] for kind in (steps[chose], steps[~chose]) if len(kind)]
    return torch.stack([kind.median(0).values * (len(kind) / len(steps)) for kind in kinds]).sum(0)


class Run:
    """A run in ``folder``: created or resumed by :meth:`open`, carried through by :meth:`execute`.

    The folder holds config.json, log.jsonl, the journal's slots while it runs, and, once it is finished, model.pt and
    result.json.
    """

    def __init__(
        self, config: RunConfig, data: Dataset, folder: Path, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.config, self.folder, self.clock = config, folder, clock
        self.device = torch.device(config.device)
        self.train, self.evaluation = data.train.to(self.device), data.test.to(self.device)
        self.order = Order(len(data.train), config.batch_size, config.seed)
        self.model = build_model(config.model, data.train, data.n_classes, config.seed).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.wrapper = wrapper_of(config, self.model, self.generator)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.momentum > 0, fused=self.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        self.weights = self.model.state_dict()  # once: its tensors are the model's own, and gathering them takes 0.1 ms
        self.log = JsonLines(folder / "log.jsonl")
        self.journal = Journal(folder)
        self.step = 0
        self.backward_samples = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)  # medians of each window x its steps: robust against a busy machine
        self.journal_seconds = 0.0
        self.window = torch.zeros(WINDOW, len(PHASES) + 1, dtype=torch.float64)  # the last: whether the rule chose

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the sums that the result reports."""
        return {
            "step": self.step, "model": self.weights, "optimizer": self.optimizer.state_dict(),
            "wrapper": self.wrapper.state_dict(), "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(), "backward_samples": self.backward_samples, "seconds": self.seconds,
            "journal_seconds": self.journal_seconds, "window": self.window,
        }  # fmt: skip

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.wrapper.load_state_dict(state["wrapper"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        self.step, self.backward_samples = state["step"], state["backward_samples"]
        self.seconds, self.journal_seconds, self.window = state["seconds"], state["journal_seconds"], state["window"]

    def open(self) -> int:
        """Continue from the newest whole state in the folder, else start afresh; returns the step it stands at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.journal.read()
        if found is None:
            write_text(self.folder / "config.json", _json(self.config.as_dict()))
            torch.manual_seed(self.config.seed)
        else:
            self.load_state(found[0])
        self.log.cut(self.step)
        return self.step

    # -------------------------------------------------------------------------------------------------- loop

    def execute(self, advance: Callable[[int, float], None] = lambda samples, loss: None) -> dict[str, Any]:
        """Run to the end and return the result, which is also written. ``advance(samples, loss)`` shows progress."""
        with thread_limit(self.config.threads):
            if self.step == 0 and self.config.evaluate_every < self.config.steps and not self.log.read():
                self._evaluate()
            loss = float("nan")
            while self.step < self.config.steps:
                self.train_step()
                if self.step % WINDOW == 0 or self.step == self.config.steps:
                    loss = self._close_window()
                if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
                    self._evaluate()
                if self.step % self.config.journal_every == 0:
                    started = time.perf_counter()
                    self.journal.write(self.state(), self.step)
                    self.journal_seconds += time.perf_counter() - started
                advance(self.config.batch_size, loss)
        return self._finish()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def train_step(self) -> None:
        """One optimizer step; its times are the newest row of the window, by the run's clock or the wrapper's."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        inputs, target = self.train.batch(self.order.indices(self.step).to(self.device))
        started = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss = self.wrapper(inputs, target)
        loss.backward()
        before = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        now = self._now()
        report = self.wrapper.report
        seconds = {**report.seconds, "optimizer": now - before, "total": now - started}
        phases = [seconds.get(phase, 0.0) for phase in PHASES]
        self.window[self.step % WINDOW] = torch.tensor([*phases, report.selected])
        self.step += 1
        self.backward_samples += report.k

    def newest(self) -> Tensor:
        """(len(PHASES) + 1,) seconds of the last step, and whether the rule chose."""
        return self.window[(self.step - 1) % WINDOW]

    def _open_window(self) -> Tensor:
        """The steps that no log row has summed up yet."""
        return self.window[: self.step % WINDOW]

    def _close_window(self) -> float:
        steps = (self.step - 1) % WINDOW + 1
        medians = typical(self.window[:steps])
        for phase, median in zip(PHASES, medians.tolist(), strict=True):
            self.seconds[phase] += median * steps
        report = self.wrapper.report
        row: dict[str, Any] = {
            "kind": "train", "step": self.step, "loss": report.loss, "accuracy": 100 * (report.accuracy or 0.0),
            "lr": self.config.rate(self.step - 1), "backward_samples": self.backward_samples,
            "seconds": self.seconds["total"], "gain": report.gain, "gain_at_cost": report.gain_at_cost,
            "milliseconds": dict(zip(PHASES, (1e3 * medians).tolist(), strict=True)),
        }  # fmt: skip
        self.log.append(row)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters()):
            raise Diverged(f"the weights are no longer finite after step {self.step}: try a lower --lr")
        return report.loss

    def _evaluate(self) -> None:
        accuracy, loss = evaluate(self.model, self.evaluation, self.device)
        pending = self._open_window()
        seconds = self.seconds["total"]
        if len(pending) and self.step < self.config.steps:
            seconds += float(typical(pending)[PHASES.index("total")]) * len(pending)
        self.log.append({
            "kind": "evaluation", "step": self.step, "accuracy": accuracy, "loss": loss,
            "backward_samples": self.backward_samples, "seconds": seconds,
        })  # fmt: skip

    def _finish(self) -> dict[str, Any]:
        rows = self.log.read()
        curve = [row for row in rows if row["kind"] == "evaluation"]
        gains = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("gain", "gain_at_cost")}
        result = {
            "key": self.config.key(), "config": self.config.as_dict(), "accuracy": curve[-1]["accuracy"],
            "loss": curve[-1]["loss"], "steps": self.step, "backward_samples": self.backward_samples,
            "seconds": self.seconds,
            "journal_seconds": self.journal_seconds,
            **{name: statistics.median(found) if found else None for name, found in gains.items()},
            "curve": [{name: row[name] for name in ("step", "accuracy", "backward_samples", "seconds")}
                      for row in curve],
        }  # fmt: skip
        partial = self.folder / ".model.pt.partial"
        torch.save(self.model.state_dict(), partial)
        partial.replace(self.folder / "model.pt")
        write_text(self.folder / "result.json", _json(result))
        self.journal.remove()
        return result


def read_config(folder: Path) -> RunConfig | None:
    """The configuration of the run in ``folder``; None where there is none. StorageError when it cannot be read."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return RunConfig.from_dict(_load(path))
    except (ValueError, TypeError) as error:
        raise StorageError(f"{path}: {error}") from error


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of the finished run in ``folder``; None where it is not finished."""
    path = folder / "result.json"
    try:
        return _load(path) if path.exists() else None
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from error


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Let torch use ``threads`` threads inside the block; 0 leaves it alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _load(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value
