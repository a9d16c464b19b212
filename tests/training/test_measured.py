"""What a rule costs: ``diagnose`` measures it, and a step warns once where it costs more than it saves."""

from __future__ import annotations

import random
import sys
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import selbp
from selbp import allocator
from selbp.training import measured, pace, stopwatch

N = 32


class Clock:
    """Stands still but for what moves it: a row's forward takes one second, its backward two."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, *unused: Any) -> float:
        return self.time

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        model.register_forward_hook(self._forward)
        return model

    def _forward(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.time += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        self.time += 2 * int(gradient.ne(0).any(1).sum())


class Slow(selbp.BaseSelector):
    """The planted rule: as good as TopLoss, and ``seconds`` slower."""

    needs = "loss"

    def __init__(self, clock: Clock, seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def choose(self, rows: Any, k: int) -> Any:
        self.clock.time += self.seconds
        return rows.pick(rows.stats.loss, k)

    def __repr__(self) -> str:
        return "Slow()"

    def __deepcopy__(self, memo: Any) -> Slow:
        return Slow(self.clock, self.seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=made))
    monkeypatch.setattr(measured, "now", made)
    monkeypatch.setattr(pace, "STEPS", 10)
    return made


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(N, 4), torch.randint(0, 3, (N,))


def warned(step: Any, times: int, between: Any = lambda: None) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            step(*batch()).backward()
            between()
    assert all(entry.filename == __file__ for entry in caught)
    return [str(entry.message) for entry in caught]


# A full step takes 3 N seconds. On rows, N + 2 k; by recomputing, N + 3 k.
@pytest.mark.parametrize("backward", ["rows", "recompute", "auto"])
def test_a_slow_rule_warns_once_with_its_figure(clock: Clock, backward: str) -> None:
    step = selbp.SelectiveBackprop(clock.model(), selector=Slow(clock, 2.5 * N), keep=0.25, backward=backward)
    assert warned(step, pace.WARM + pace.STEPS) == []
    (said,) = warned(step, 30)
    own = N + 2.5 * N + (2 if step.report.backward == "rows" else 3) * N // 4
    price = float(said.partition("takes about ")[2].partition(" of a full step's time")[0])
    assert price == pytest.approx(own / (3 * N), abs=0.0051)
    assert f'Slow() with backward="{step.report.backward}" at keep=0.25' in said
    assert f"select {2500 * N:.3g} ms" in said and "medians of 10 steps of 32 samples" in said


@pytest.mark.parametrize("backward", ["rows", "recompute", "auto"])
@pytest.mark.parametrize("seconds", [0.0, 0.9 * N], ids=["free", "dear"])
def test_a_rule_that_pays_does_not_warn(clock: Clock, backward: str, seconds: float) -> None:
    step = selbp.SelectiveBackprop(clock.model(), selector=Slow(clock, seconds), keep=0.25, backward=backward)
    assert warned(step, 30) == [] and step._pace.done


def test_no_look_without_a_backward_or_scoring(clock: Clock) -> None:
    slow = Slow(clock, 100 * N)
    step = selbp.SelectiveBackprop(clock.model(), selector=slow, keep=0.25, backward="recompute")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(30):
            step(*batch())
        assert step._pace.done
        for options in ({"selector": selbp.Random(), "keep": 0.5}, {"selector": slow, "keep": 1.0}):
            other = selbp.SelectiveBackprop(clock.model(), **options)
            for _ in range(30):
                other(*batch()).backward()
            assert not other._pace.done


class Event:
    """One of a device that is behind: it may be asked whether it has come, and not waited for."""

    come = False

    def query(self) -> bool:
        return self.come

    def synchronize(self) -> None:
        assert self.come, "the host waits for the device"

    def elapsed_time(self, other: Event) -> float:
        return 1000.0


@pytest.mark.parametrize("come", [False, True], ids=["behind", "done"])
def test_no_look_waits_for_a_device(clock: Clock, come: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch.Stopwatch, "_now", lambda watch: Event())
    monkeypatch.setattr(Event, "come", come)
    step = selbp.SelectiveBackprop(clock.model(), selector=selbp.TopLoss(), keep=0.75, backward="recompute")
    start = stopwatch.Stopwatch.__init__

    def on_a_device(watch: stopwatch.Stopwatch, device: torch.device) -> None:
        start(watch, device)
        watch._events = True

    monkeypatch.setattr(stopwatch.Stopwatch, "__init__", on_a_device)
    assert len(warned(step, 30)) == int(come) and step._pace.done


def test_micro_batches_are_looked_at_too(clock: Clock) -> None:
    step = selbp.SelectiveBackprop(clock.model(), selector=Slow(clock, 5 * N), keep=0.25, micro_batch=8)
    with pytest.warns(UserWarning, match=f"takes about {(1 + 5 + 0.75) / 3:.2f} of a full step"):
        for _ in range(14):
            step.backward(*batch())


def test_the_two_parts_of_scoring_are_one_phase(clock: Clock) -> None:
    step = selbp.SelectiveBackprop(clock.model(), selector=Slow(clock, 7.0), keep=0.25, backward="recompute")
    step(*batch()).backward()
    assert step.report.seconds == {"score": N, "select": 7.0, "forward": N / 4, "backward": N / 2}


def test_diagnose_measures_a_rule(clock: Clock) -> None:
    model, (x, y) = clock.model(), batch()
    found = selbp.diagnose(model, (x, y), 0.25, selector=Slow(clock, 10.0), steps=3)
    assert found.measured is not None
    assert found.measured.seconds == {"full": 3.0 * N, "rows": 1.5 * N + 10, "recompute": 1.75 * N + 10}
    assert found.recommendation == "rows"
    assert f'Slow(), on 8 of 32 rows with backward="rows": {(1.5 * N + 10) / (3 * N):.2f} of a full' in found.summary
    assert "measured: medians of 3 steps of each, the processor's time" in found.summary
    assert str(found).endswith(f"recommended: {found.summary}")
    dear = selbp.diagnose(model, (x, y), 0.25, selector=Slow(clock, 100.0 * N), steps=1)
    assert dear.summary.startswith('the full step: Slow(), on 8 of 32 rows, takes at best, with backward="rows", 33.8')


def test_memory_is_measured_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.GELU())), nn.Linear(16, 3))
    rows = torch.randn(4096, 16), torch.randint(0, 3, (4096,))
    found = selbp.diagnose(model, rows, 0.25, selector=selbp.TopLoss(), steps=1).measured
    assert found is not None
    assert 0.2 < found.memory["recompute"] / found.memory["full"] < 0.5
    assert 0.8 < found.memory["rows"] / found.memory["full"] < 1.2


def test_diagnose_leaves_the_rule_and_the_model_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rule, generator = selbp.LossPercentile(), torch.Generator().manual_seed(3)
    before, drawn = rule.state_dict(), generator.get_state()
    random = torch.get_rng_state()
    selbp.diagnose(model, batch(), 0.25, selector=rule, steps=1, generator=generator, head="3")
    assert str(rule.state_dict()) == str(before) and torch.equal(drawn, generator.get_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.set_rng_state(random)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"selector": selbp.Random()}, {"full", "recompute"}),
        ({"selector": selbp.TopLoss(), "scoring": "eval"}, {"full", "recompute"}),
        ({"selector": selbp.TopLoss(), "batchnorm": "subset"}, {"full", "rows", "recompute"}),
        ({"selector": selbp.GradientMatching(), "cut": "1"}, {"full", "rows", "recompute"}),
        ({"selector": selbp.GradientMatching(), "head_gradient": "full"}, {"full", "rows", "recompute"}),
    ],
    ids=["random", "eval", "batchnorm", "cut", "full head"],
)
def test_the_kinds_that_the_options_allow(options: dict[str, Any], kinds: set[str]) -> None:
    found = selbp.diagnose(Clock().model(), batch(), 0.25, steps=1, **options).measured
    assert found is not None and set(found.seconds) == kinds == set(found.memory)


class Centred(nn.Module):
    """Its samples interact, and its forward binds a buffer anew."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        out: torch.Tensor = self.head(x - x.mean(0))
        return out


def test_a_model_whose_samples_interact_is_measured_on_rows_only() -> None:
    torch.manual_seed(0)
    model = Centred()
    before = model.count
    found = selbp.diagnose(model, batch(), 0.25, selector=selbp.TopLoss(), steps=1).measured
    assert found is not None and set(found.seconds) == {"full", "rows"}
    assert model.count is before and before == 0


@pytest.mark.parametrize("without", [None, "recompute", "rows"], ids=["all", "no recompute", "no rows"])
def test_no_step_is_run_that_is_not_measured(monkeypatch: pytest.MonkeyPatch, without: str | None) -> None:
    """Such as by recomputing with ``cut=`` under DistributedDataParallel, or on rows with ``scoring="eval"``."""
    made, calls = measured._kinds, Counter[str]()

    def counted(*args: Any) -> dict[str, Any]:
        def count(name: str, step: Any) -> Any:
            return lambda *batch: calls.update([name]) or step(*batch)

        return {name: count(name, step) for name, step in made(*args).items() if name != without}

    monkeypatch.setattr(measured, "_kinds", counted)
    selbp.diagnose(Clock().model(), batch(), 0.25, selector=selbp.TopLoss(), steps=3)
    assert calls == dict.fromkeys({"full", "rows", "recompute"} - {without}, measured.WARM + 3 + 1)  # and one for bytes


def test_options_of_samples_and_loss_need_no_selector() -> None:
    with torch.no_grad():
        found = selbp.diagnose(Clock().model(), batch(), class_weight=torch.ones(3), ignore_index=7)
    assert found.measured is None


def test_a_warning_that_is_an_error_costs_one_step(clock: Clock) -> None:
    step = selbp.SelectiveBackprop(clock.model(), selector=Slow(clock, 2.5 * N), keep=0.25, backward="recompute")
    raised = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(pace.WARM + pace.STEPS + 5):
            try:
                step(*batch()).backward()
            except UserWarning:
                raised += 1
    assert raised == 1 and step._step == pace.WARM + pace.STEPS + 5


def test_wrong_calls() -> None:
    model = Clock().model()
    with pytest.raises(TypeError, match="proxy must come with a selector"):
        selbp.diagnose(model, batch(), proxy="sketch")
    with pytest.raises(TypeError, match="selector must be an instance"):
        selbp.diagnose(model, batch(), selector=selbp.TopLoss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        selbp.diagnose(model, batch(), selector=selbp.TopLoss(), steps=0)
    with pytest.raises(ValueError, match="micro_batch does nothing"):
        selbp.diagnose(model, batch(), selector=selbp.TopLoss(), micro_batch=4)
    with pytest.raises(ValueError, match="model must have a parameter that requires a gradient, got none"):
        selbp.diagnose(Clock().model().requires_grad_(False), batch())
    with pytest.raises(ValueError, match="scoring must be"):
        selbp.diagnose(model, batch(), selector=selbp.TopLoss(), scoring="often")


# Of the model's 2 N seconds of a backward, a cut below its last layer saves nothing.
@pytest.mark.parametrize(
    ("cut", "rule", "least"),
    [(None, selbp.TopLoss(), 1.5 * N), ("1", selbp.GradientMatching(), 3.0 * N)],
    ids=["step", "cut"],
)
@pytest.mark.parametrize("overhead", [0.0, 2.0 * N], ids=["large", "small"])
def test_rows_of_a_small_network_warn_where_their_overhead_costs_more_than_they_save(
    clock: Clock, overhead: float, cut: str | None, rule: Any, least: float
) -> None:
    """Times n / k that is more than a full backward, so that it does not follow from the parts of a step."""

    def dear(gradient: torch.Tensor) -> None:
        clock.time += overhead if int(gradient.ne(0).any(1).sum()) < N else 0.0

    model: Any = clock.model()
    model[0].register_forward_hook(lambda module, args, out: out.register_hook(dear) and None)
    step = selbp.SelectiveBackprop(model, selector=rule, keep=0.25, backward="rows", cut=cut)
    said = warned(step, 30)
    assert step._pace.done and len(said) == (overhead > 0)
    if said:
        assert f"takes about {(least + overhead) / (3 * N):.2f} of a full step's time" in said[0]
        assert ("selbp.keep_freed_memory()" in said[0]) == (sys.platform.startswith("linux") and not allocator.kept())
        assert f"of all of them would take about {3000 * N:.3g} ms" in said[0]
        assert ("select 0 ms" in said[0], "backward" in said[0]) == (False, True)


class Restless(nn.Module):
    """Draws from every source, and changes its buffers in every way; its backward needs one that it does not change."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8, bias=False))
        self.still, self.head = nn.BatchNorm1d(8).eval(), nn.Linear(8, 3)
        for name, value in {"count": torch.zeros(()), "mean": torch.zeros(8), "variance": torch.ones(8)}.items():
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + random.random() + numpy.random.rand()
        h = self.still(self.body(x))
        h = nn.functional.batch_norm(h, self.mean, self.variance, training=True)  # type: ignore[arg-type]
        out: torch.Tensor = self.head(h) * self.count
        return out


def test_the_full_steps_that_are_measured_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(looks: bool) -> list[Any]:
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        model, seen = Restless(), []
        step = selbp.SelectiveBackprop(model, selector=selbp.LossPercentile(), keep=0.25, backward="rows", head="head")
        step._pace.done = not looks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(pace.WARM + pace.STEPS + 2):
                (step(*batch()) + step(*batch())).backward()  # the first one's backward is to come during the second
                seen += [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        assert bool(step._pace._full) == looks
        state = str(step.state_dict()), torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
        return [*seen, *model.state_dict().values(), *state]

    monkeypatch.setattr(pace, "STEPS", 10)
    for one, other in zip(run(True), run(False), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("cause", ["fails", "processes"])
def test_no_look_where_no_full_step_can_be_measured(clock: Clock, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = clock.model()
    step = selbp.SelectiveBackprop(model, selector=Slow(clock, 100 * N), keep=0.25, backward="rows")
    if cause == "fails":
        monkeypatch.setattr(step, "_mean_loss", lambda model, batch: 1 / 0)
    else:
        others = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
        monkeypatch.setattr(pace, "distributed", others)
    assert warned(step, 30) == [] and step._pace.done


def test_nothing_is_compiled_for_the_full_steps(clock: Clock) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    step = selbp.SelectiveBackprop(
        torch.compile(model, backend=backend), selector=Slow(clock, 9 * N), keep=0.25, backward="rows"
    )
    for _ in range(pace.WARM + pace.STEPS):
        step(*batch()).backward()
    before = len(graphs)
    warned(step, 3)
    assert len(step._pace._full or ()) == 3 and len(graphs) == before
