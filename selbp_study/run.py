"""One training run: the loop, its log, and a state that is whole after every step.

The evaluation split is read by :func:`selbp_study.samples.evaluate` and by nothing else; nothing that it returns flows
back into training.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selbp_study.arms import options_of
from selbp_study.config import RunConfig
from selbp_study.data import Dataset
from selbp_study.folder import check_log, is_number, read_config, read_result, short, to_json
from selbp_study.kept import KeptRun
from selbp_study.models import build_model
from selbp_study.sampled import SampledOrder, Sampling, order_of
from selbp_study.samples import BatchOrder, evaluate
from selbp_study.storage import write_bytes, write_text
from selbp_study.timing import CLOCKS, PHASES, TimedStep, clock_for, phases_of, thread_limit, typical, wrapper_of

__all__ = [
    "PHASES",
    "Diverged",
    "BatchOrder",
    "Run",
    "evaluate",
    "read_config",
    "read_result",
    "thread_limit",
    "typical",
]

WINDOW = 50  # steps a log row sums up
TURN = 10  # steps of a run before the next run's turn, where several go side by side


class Diverged(Exception):
    """The loss is no longer finite: the run cannot go on."""


class Run(KeptRun):
    """A run in ``folder``: created or resumed by :meth:`open`, carried through by :meth:`execute`.

    Once it is finished, the folder holds model.pt and result.json. ``clock`` is :mod:`selbp_study.timing`'s for the
    device.
    """

    def __init__(
        self, config: RunConfig, data: Dataset, folder: Path, clock: Callable[[], float] | None = None
    ) -> None:
        super().__init__(config, folder)
        self.clock = CLOCKS[clock_for(config.device)] if clock is None else clock
        self.device = torch.device(config.device)
        self.train, self.evaluation = data.train.to(self.device), data.test.to(self.device)
        sampling = Sampling.split(options_of(config.options))[0]
        self.order = order_of(sampling, config, data.train, data.n_classes, self.clock)
        self.model = build_model(config.model, data.train, data.n_classes, config.seed).to(self.device)
        self.generator = torch.Generator(self.device).manual_seed(config.seed + 1)
        sampled = self.order if isinstance(self.order, SampledOrder) else None
        self.wrapper = self._wrapper({} if sampled is None else sampled.step_options)
        self.stepping = self.wrapper if sampled is None else sampled.steps_by(self.wrapper)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.weights = self.model.state_dict()  # once: its tensors are the model's own, and gathering them takes 0.1 ms
        self.backward_samples = 0
        self.seconds = dict.fromkeys(PHASES, 0.0)  # medians of each window x its steps: robust against a busy machine
        if sampled is not None:
            for phase in ("select", "total"):
                self.seconds[phase] += sampled.proxy_seconds
        self.journal_seconds = 0.0
        self.window = torch.zeros(WINDOW, len(PHASES) + 1, dtype=torch.float64)  # the last: whether the rule chose

    def _wrapper(self, own: Mapping[str, Any]) -> TimedStep:
        """The training step; the options ``own`` stand above the configuration's."""
        made = wrapper_of(self.config, self.model, self.generator, own)
        made._pace.done = True  # no look at the price: tables show it
        made.clock = self.clock
        return made

    # ------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the sums that the result reports."""
        return {
            "step": self.step,
            "model": self.weights,
            "optimizer": self.optimizer.state_dict(),
            "wrapper": self.wrapper.state_dict(),
            "generator": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "backward_samples": self.backward_samples,
            "seconds": self.seconds,
            "journal_seconds": self.journal_seconds,
            "window": self.window,
            **({"order": self.order.state()} if self.order.charged else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`. ValueError, or what torch raises, for a state that is none of this run's."""
        times, window = state["seconds"], state["window"]
        wrong = [
            name
            for name, good in (
                ("step", type(state["step"]) is int and 0 <= state["step"] <= self.config.steps),
                ("backward_samples", is_number(state["backward_samples"])),
                ("journal_seconds", is_number(state["journal_seconds"])),
                ("seconds", times.keys() == self.seconds.keys() and all(map(is_number, times.values()))),
                ("window", (window.shape, window.dtype) == (self.window.shape, self.window.dtype)),
            )
            if not good
        ]
        if wrong:
            raise ValueError(f"{wrong[0]} is {short(state[wrong[0]])}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.wrapper.load_state_dict(state["wrapper"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])
        self.order.load_state(state.get("order", {}))
        self.step, self.backward_samples = state["step"], state["backward_samples"]
        self.seconds, self.journal_seconds, self.window = state["seconds"], state["journal_seconds"], state["window"]

    # -------------------------------------------------------------------------------------------------- loop

    def execute(self, advance: Callable[[int, float], None] = lambda samples, loss: None) -> dict[str, Any]:
        """Run to the end and return the result, which is also written. ``advance(samples, loss)`` shows progress."""
        turns = self.turns(advance)
        while True:
            try:
                next(turns)
            except StopIteration as end:
                return end.value

    def turns(
        self, advance: Callable[[int, float], None] = lambda samples, loss: None
    ) -> Generator[None, None, dict[str, Any]]:
        """As :meth:`execute`, in turns of :data:`TURN` steps: another run may train before each next one.

        torch's global generator is this run's own in its turns, so that who else trains changes nothing.
        """
        loss = float("nan")
        try:
            while True:
                with self._turn():
                    if self.step == 0 and self.config.evaluate_every < self.config.steps and not self.log.read():
                        self._evaluate()
                    for _ in range(min(TURN, self.config.steps - self.step)):
                        loss = self._advance(loss)
                        advance(self.config.batch_size, loss)
                if self.step >= self.config.steps:
                    return self._finish()
                yield
        finally:
            self.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        torch.set_rng_state(self.random)
        with thread_limit(self.config.threads):
            yield
        self.random = torch.get_rng_state()

    def _advance(self, loss: float) -> float:
        """One step and what is due after it; the loss of the newest window, ``loss`` where that was before."""
        self.train_step()
        if self.step % WINDOW == 0 or self.step == self.config.steps:
            loss = self._close_window()
        if self.step % self.config.evaluate_every == 0 or self.step == self.config.steps:
            self._evaluate()
        if self.step % self.config.journal_every == 0:
            started = time.perf_counter()
            self.journal.write(self.state(), self.step)
            self.journal_seconds += time.perf_counter() - started
        return loss

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def train_step(self) -> None:
        """One optimizer step; its times are the newest row of the window, by the run's clock (on a GPU, by events)."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        drawing = self._now()
        indices = self.order.indices(self.step)
        draw = self._now() - drawing if self.order.charged else 0.0
        inputs, target = self.train.batch(indices.to(self.device))
        self.wrapper.choice = None
        started = self._now()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss = self.stepping(inputs, target)
        forward = self._now()
        loss.backward()
        before = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        now = self._now()
        report = self.wrapper.report
        events = self.device.type == "cuda"
        split = report.seconds if events else phases_of(self.wrapper.choice, started, forward, before)
        seconds = {**split, "optimizer": now - before, "total": now - started + draw}
        seconds["select"] = seconds.get("select", 0.0) + draw
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
            "kind": "train",
            "step": self.step,
            "loss": report.loss,
            "accuracy": None if report.accuracy is None else 100 * report.accuracy,  # a loss of its own says none
            "lr": self.config.rate(self.step - 1),
            "backward_samples": self.backward_samples,
            "seconds": self.seconds["total"],
            "gain": report.gain,
            "gain_at_cost": report.gain_at_cost,
            "milliseconds": dict(zip(PHASES, (1e3 * medians).tolist(), strict=True)),
        }
        if isinstance(self.order, SampledOrder):
            row |= self.order.figures()
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
        self.log.append(
            {
                "kind": "evaluation",
                "step": self.step,
                "accuracy": accuracy,
                "loss": loss,
                "backward_samples": self.backward_samples,
                "seconds": seconds,
            }
        )

    def _finish(self) -> dict[str, Any]:
        rows = check_log(self.log, self.config, self.step)
        curve = [row for row in rows if row.get("kind") == "evaluation"]
        gains = {name: [row[name] for row in rows if row.get(name) is not None] for name in ("gain", "gain_at_cost")}
        result = {
            "key": self.config.key(),
            "config": self.config.as_dict(),
            "accuracy": curve[-1]["accuracy"],
            "loss": curve[-1]["loss"],
            "steps": self.step,
            "backward_samples": self.backward_samples,
            "seconds": self.seconds,
            "journal_seconds": self.journal_seconds,
            "clock": clock_for(self.device),
            **{name: statistics.median(found) if found else None for name, found in gains.items()},
            "curve": [
                {name: row[name] for name in ("step", "accuracy", "backward_samples", "seconds")} for row in curve
            ],
        }
        weights = io.BytesIO()
        torch.save(self.model.state_dict(), weights)
        write_bytes(self.folder / "model.pt", weights.getvalue())
        write_text(self.folder / "result.json", to_json(result))
        self.journal.remove()
        return result
