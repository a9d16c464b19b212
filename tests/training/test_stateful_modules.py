"""Modules that write their buffers as they train: a second forward computes what the scoring one did, and leaves that.

Each is trained on rows, which run one forward, and by the ways that run the chosen rows again.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.processes import in_two_processes
from support.training_kit import assert_same
from torch import Tensor, nn
from torch.distributed import broadcast
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as older_spectral_norm
from torch.utils.checkpoint import checkpoint

import selbp

EXACT = 1e-10  # of float64: the two ways sum in another order
N = 16


class Counter(nn.Module):
    """Its factor depends on how often it ran."""

    def __init__(self, *, eval_too: bool = False, start: int = 0) -> None:
        super().__init__()
        self.eval_too, self.start = eval_too, start
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.eval_too:
            self.count()
        return x * (1 + (0 if self.calls is None else self.calls))

    def count(self) -> None:
        self.calls += 1


class Rebound(Counter):
    def count(self) -> None:
        self.calls = self.calls + 1


class InitialisedLate(Counter):
    """Its buffer is None until it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = None

    def count(self) -> None:
        self.calls = torch.ones(()) if self.calls is None else self.calls + 1


class RegisteredLate(nn.Module):
    """It has no buffer until it runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.ones(()))
        if self.training:
            self.scale += 1
        return x * self.scale


class Shared(nn.Module):
    """Two modules have one buffer: one writes it, the other reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes, self.reads = Counter(), nn.Module()
        self.reads.register_buffer("calls", self.writes.calls)

    def forward(self, x: Tensor) -> Tensor:
        return self.writes(x) * (1 + self.reads.calls)


class RunningMean(nn.Module):
    """Subtracts the mean of the minibatches before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.sigmoid(x - self.mean) * (1 + self.mean)  # a product keeps the buffer for the backward
        if self.training:
            self.mean = self.mean.lerp(x.detach().mean(0), 0.5)
        return out


class FollowedNorm(nn.BatchNorm1d):
    """Normalises by what it has followed so far."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_var is not None
        out = (x - self.running_mean) / self.running_var.sqrt()
        if self.training:
            self.running_mean = self.running_mean.lerp(x.detach().mean(0), 0.5)
            self.running_var = self.running_var.lerp(x.detach().var(0), 0.5)
        return out


class Unseen(nn.Module):
    """Subtracts the mean before; batch norm's operator writes it, and its version stays."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8, dtype=torch.float64))
        self.register_buffer("var", torch.ones(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.mean
        if self.training:
            nn.functional.batch_norm(x.detach(), self.mean, self.var, training=True)
        return out


class EverySecond(Counter):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.zeros(()))

    def count(self) -> None:
        self.turn += 1
        if self.turn % 2 == 1:
            self.calls += 1


class SumsLate(nn.Module):
    """Begins late to sum what it sees; its output does not depend on that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("sum", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls > 2:
                self.sum += x.detach().abs().sum()
        return x


def older(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return older_spectral_norm(layer)


MODULES: dict[str, Any] = {
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
    "older spectral norm": lambda: older(nn.Linear(8, 8)),
    "counter": Counter,
    "rebound counter": Rebound,
    "initialised late": InitialisedLate,
    "registered late": RegisteredLate,
    "shared": Shared,
    "running mean": RunningMean,
    "batch norm of the past": lambda: FollowedNorm(8),
    "written without a trace": Unseen,
    "written in every second step": EverySecond,
    "written from the third minibatch on": SumsLate,
}
WAYS: dict[str, dict[str, Any]] = {
    "recompute": {"backward": "recompute"},
    "full head": {"backward": "recompute", "head_gradient": "full"},
    "gradients": {"backward": "recompute", "selector": selbp.GradientMatching()},
    "micro-batch": {"micro_batch": N},
    "all ranks": {"scope": "global"},
    "below a cut": {"backward": "recompute", "cut": "middle", "selector": selbp.GradientMatching()},
}


class Net(nn.Module):
    def __init__(self, module: nn.Module, head: nn.Module | None = None, wrapped: bool = False) -> None:
        super().__init__()
        self.first, self.module, self.middle = nn.Linear(6, 8), module, nn.Identity()
        self.head, self.wrapped = head or nn.Linear(8, 3), wrapped

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = checkpoint(self.module, x, use_reentrant=False) if self.wrapped else self.module(x)
        return self.head(torch.tanh(self.middle(x)))


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return Net(MODULES[name](), **options).double()


def minibatches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(N, 6, generator=generator).double(), torch.randint(0, 3, (N,), generator=generator))
        for _ in range(count)
    ]


def step_of(model: nn.Module, **options: Any) -> selbp.SelectiveBackprop:
    return selbp.SelectiveBackprop(model, **{"selector": selbp.TopLoss(), "keep": 0.25, **options})


def grown(model: nn.Module, **options: Any) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The gradients and the buffers after each step."""
    step, gradients, buffers = step_of(model, **options), [], []
    for x, y in minibatches():
        model.zero_grad()
        step.backward(x, y)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        buffers.append({name: b.clone() for name, b in model.named_buffers()})
    return gradients, buffers


def assert_same_steps(got: Any, want: Any) -> None:
    for kind in range(2):
        for a, b in zip(got[kind], want[kind], strict=True):
            assert_same(a, b, rtol=EXACT)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_gradients_and_buffers_are_those_of_one_forward(name: str, way: str) -> None:
    alike = {key: value for key, value in WAYS[way].items() if key not in ("micro_batch", "scope")}
    want = grown(build(name), **{**alike, "backward": "rows"})
    assert_same_steps(grown(build(name), **WAYS[way]), want)


@pytest.mark.filterwarnings("ignore")  # deprecated
def test_a_convolution_that_reads_the_statistics_of_its_norm() -> None:
    fused = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    quantization = pytest.importorskip("torch.ao.quantization")
    fakes = quantization.default_fake_quant, quantization.default_weight_fake_quant

    def run(backward: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        config = quantization.QConfig(*fakes)
        model = nn.Sequential(fused.ConvBn2d(3, 4, 3, qconfig=config), nn.Flatten(), nn.Linear(64, 3)).train()
        step = step_of(model, keep=1.0, backward=backward)  # batch norm among fewer rows is another
        for _ in range(2):
            model.zero_grad()
            step(torch.randn(N, 3, 6, 6), torch.randint(0, 3, (N,))).backward()
        return {**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}

    assert_same(run("recompute"), run("rows"))


@pytest.mark.parametrize("way", ["recompute", "gradients", "micro-batch"])
@pytest.mark.parametrize("kind", [parametrizations.spectral_norm, older])
def test_a_head_with_spectral_norm(kind: Any, way: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return Net(nn.Identity(), kind(nn.Linear(8, 3))).double()

    alike = {key: value for key, value in WAYS[way].items() if key != "micro_batch"}
    assert_same_steps(grown(made(), **WAYS[way]), grown(made(), **{**alike, "backward": "rows"}))


@pytest.mark.parametrize("way", ["recompute", "gradients"])
@pytest.mark.parametrize("name", ["spectral norm", "counter", "rebound counter"])
def test_a_checkpoint_that_runs_the_module_again_changes_nothing(name: str, way: str) -> None:
    """Torch's second run sees what the first left, so no gradient is compared."""
    _, got = grown(build(name, wrapped=True), **WAYS[way])
    _, want = grown(build(name), **{**WAYS[way], "backward": "rows"})
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, rtol=EXACT)


def test_two_losses_with_one_backward() -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        model = build("running mean")
        step = step_of(model, **options)
        sum(step(x, y) for x, y in minibatches()).backward()
        return {**{name: p.grad for name, p in model.named_parameters()}, **dict(model.named_buffers())}

    assert_same(run(backward="recompute"), run(backward="rows"), rtol=EXACT)
    cut: dict[str, Any] = {"cut": "middle", "selector": selbp.GradientMatching()}
    assert_same(run(backward="recompute", **cut), run(backward="rows", **cut), rtol=EXACT)


@pytest.mark.parametrize("name", ["spectral norm", "counter"])
def test_micro_batches_start_from_what_the_first_of_them_was_scored_with(name: str) -> None:
    model, other = build(name), build(name)
    x, y = minibatches()[0]
    step = step_of(model, micro_batch=2, keep=0.5)
    step.backward(x, y)
    losses = nn.functional.cross_entropy(other(x), y, reduction="none")
    selection = step.report.selection
    (losses[selection.indices] * selection.weights).sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    assert_same(got, {name: p.grad for name, p in other.named_parameters()}, rtol=EXACT)
    if name == "counter":
        assert model.module.calls == N / 2  # forwards that scored


def test_samples_that_interact_are_counted_once() -> None:
    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")

    model = build("counter")
    step = step_of(model, loss=contrastive)
    step(*minibatches()[0]).backward()
    assert "samples interact" in str(step._strategy.reason) and model.module.calls == 1


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}])
def test_an_error_leaves_the_buffers_as_they_were(options: dict[str, Any]) -> None:
    class Broken(selbp.TopLoss):
        def select(self, *args: Any, **kwargs: Any) -> Any:
            raise ArithmeticError

    for name in ("counter", "rebound counter", "registered late"):
        model = build(name)
        before = {name: b.clone() for name, b in model.named_buffers()}
        with pytest.raises(ArithmeticError):
            step_of(model, selector=Broken(), **{"backward": "recompute", **options}).backward(*minibatches()[0])
        assert_same(dict(model.named_buffers()), before, rtol=0)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 4}])
def test_scoring_in_evaluation_mode_leaves_no_trace(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Net(Counter(eval_too=True)).double()
    step = step_of(model, scoring="eval", **options)
    for count, batch in enumerate(minibatches(2), 1):
        step.backward(*batch)
        assert model.module.calls == count


def test_rows_without_a_weight_are_counted_once() -> None:
    model = build("counter")
    x, y = minibatches()[0]
    step_of(model, backward="rows", ignore_index=-1)(x, torch.full_like(y, -1)).backward()
    assert model.module.calls == 1


def check_ranks(rank: int) -> None:
    x, y = minibatches(2)[rank]
    found = []
    for backward in ("rows", "recompute"):
        model = build("running mean")
        parallel = DistributedDataParallel(model)
        step, scored = step_of(parallel, backward=backward), {}
        for turn in range(3):
            model.zero_grad()
            step(x, y).backward()
            scored[f"loss {turn}"] = step.report.mean_loss()  # of the buffers that rank 0's step before has left
        parallel(x)  # what was rank 0's is now every rank's, and each has gone on
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**scored, **gradients, **dict(model.named_buffers())})
    assert_same(found[1], found[0], rtol=EXACT)

    model = Net(nn.BatchNorm1d(8)).double()
    step = step_of(DistributedDataParallel(model), backward="recompute")
    step(x, y).backward()
    first = model.module.running_mean.clone()
    broadcast(first, 0)
    assert torch.equal(model.module.running_mean, first)


def test_the_ranks_of_a_wrapper_keep_the_buffers_of_the_first() -> None:
    in_two_processes(check_ranks)
