"""Two processes over gloo: the head's exact gradient passes the reducer, and the global target is that of all ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two_processes
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.training.graph_checks import check_graph

N = 16


def data(rank, step=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(N, 12, generator=generator), torch.randint(0, 5, (N,), generator=generator)


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))


class Spy(selbp.GradientMatching):
    """Remembers the mean gradient it was given."""

    def select(self, stats, k, *, proxies=None, extras=None, generator=None):
        object.__setattr__(self, "mean", proxies.mean_gradient())
        return super().select(stats, k, proxies=proxies, extras=extras, generator=generator)


def full_gradient(model, steps=1):
    """The ordinary gradient of both ranks' minibatches together."""
    loss = sum(F.cross_entropy(model(x), y) for s in range(steps) for x, y in (data(0, s), data(1, s))) / (2 * steps)
    return torch.autograd.grad(loss, list(model.parameters()))


def check_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def check_all(rank):
    for find_unused in (False, True):
        for scoring in ("same", "eval"):
            full_head_passes_the_reducer(rank, find_unused, scoring)
    accumulation_and_scaling(rank)
    global_target(rank)
    a_report_waits_for_no_rank(rank)
    for kind in KINDS:
        every_step_is_averaged(rank, "static_graph", kind)
    for kind in ("logits edited", "full head"):
        every_step_is_averaged(rank, "find_unused_parameters", kind)
    a_step_that_bypasses_the_wrapper(rank)


class Scaled(nn.Sequential):
    """Changes its logits after the head, in place: the gradient at the head is read by autograd."""

    def forward(self, x):
        z = super().forward(x)
        return z.mul_(1 + z.detach().square())


def squares(output, target):
    return (output - F.one_hot(target, 5)).square().mean(1)


MATCHING = {"selector": selbp.GradientMatching(), "backward": "rows"}
KINDS = {  # the model's class, and the step's options
    "matching": (nn.Sequential, MATCHING),
    "logits edited": (Scaled, MATCHING),
    "full head": (nn.Sequential, {**MATCHING, "head_gradient": "full"}),
    "own loss": (nn.Sequential, {**MATCHING, "loss": squares}),
    "losses only": (nn.Sequential, {**MATCHING, "selector": selbp.TopLoss()}),
    "recomputed": (nn.Sequential, {**MATCHING, "backward": "recompute"}),
    "cut": (nn.Sequential, {**MATCHING, "cut": "0"}),
}


def every_step_is_averaged(rank, wrapped, kind):
    """Each step's gradients are the average over ranks of what each rank's selection gives, by plain torch."""
    network_class, options = KINDS[kind]
    model = network_class(*network())
    flag = wrapped.partition(",")[0]
    ddp = DistributedDataParallel(model, **{flag: True})
    if "compiled" in wrapped:
        ddp = torch.compile(ddp, backend="eager")
    step = selbp.SelectiveBackprop(ddp, keep=0.25, **options)
    for turn in range(3):
        model.zero_grad()
        step(*data(rank, turn)).backward()
        got = [p.grad.clone() for p in model.parameters()]
        other = [g.clone() for g in got]
        for g in other:
            dist.broadcast(g, 0)
        for a, b in zip(got, other, strict=True):
            assert torch.equal(a, b), (wrapped, kind, turn)
        plain = network_class(*network())
        x, y = data(rank, turn)
        losses = squares(plain(x), y) if "loss" in options else F.cross_entropy(plain(x), y, reduction="none")
        if "cut" in options:
            want = list(torch.autograd.grad(losses.mean(), list(plain.parameters())))
            first = 2  # what is above the cut; below it is another selection's
        else:
            indices, weights = step.report.selection
            want = list(torch.autograd.grad(losses[indices] @ weights, list(plain.parameters()), retain_graph=True))
            first = 0
        if "head_gradient" in options:
            want[2:] = torch.autograd.grad(losses.mean(), [plain[2].weight, plain[2].bias])
        for a, b in zip(got[first:], want[first:], strict=True):
            dist.all_reduce(b)
            try:
                check_close(a, b / 2)
            except AssertionError as error:
                raise AssertionError(f"{wrapped}, {kind}, step {turn}") from error


class Trainer(nn.Module):
    """A module whose forward is the step, on a model that it holds: DDP goes around it, as trainers do."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.step = selbp.SelectiveBackprop(self.net, selector=selbp.GradientMatching(), keep=0.25)

    def forward(self, x, y):
        return self.step(x, y)


def a_step_that_bypasses_the_wrapper(rank):
    model = network()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
    ddp = DistributedDataParallel(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Build the step after wrapping"):
            step(*data(rank))
    with ddp.no_sync():
        step(*data(rank))
    with pytest.raises(RuntimeError, match="Build the step after wrapping"):
        step(*data(rank))
    del ddp
    step(*data(rank))  # on its own again
    trainer = DistributedDataParallel(Trainer())
    trainer(*data(rank)).backward()
    grad = trainer.module.net[0].weight.grad
    other = grad.clone()
    dist.broadcast(other, 0)
    assert torch.equal(grad, other)


def full_head_passes_the_reducer(rank, find_unused, scoring):
    model, plain = network(), network()
    ddp = DistributedDataParallel(model, find_unused_parameters=find_unused)
    step = selbp.SelectiveBackprop(
        ddp, selector=selbp.GradientMatching(), keep=0.25, head_gradient="full", scoring=scoring
    )
    for _ in range(2):
        model.zero_grad()
        step(*data(rank)).backward()
    exact = full_gradient(plain)
    check_close(model[2].weight.grad, exact[2])
    check_close(model[2].bias.grad, exact[3])
    assert (model[0].weight.grad - exact[0]).norm() > 1e-3 * exact[0].norm()  # of the chosen rows only
    trunk = model[0].weight.grad.clone()
    dist.all_reduce(trunk)
    check_close(trunk / 2, model[0].weight.grad)  # equal on both ranks


def accumulation_and_scaling(rank):
    model, plain = network(), network()
    ddp = DistributedDataParallel(model)
    step = selbp.SelectiveBackprop(ddp, selector=selbp.TopLoss(), keep=0.25, head_gradient="full")
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ddp.no_sync():
        scaler.scale(step(*data(rank, 0)) / 2).backward()
    scaler.scale(step(*data(rank, 1)) / 2).backward()
    scaler.unscale_(optimizer)
    check_close(model[2].weight.grad, full_gradient(plain, steps=2)[2])


def global_target(rank):
    model, plain = network(), network()
    rule = Spy()
    wrapped = DistributedDataParallel(model)
    with mock.patch("torch.distributed.is_initialized", lambda: False):  # as if the processes had not met yet
        step = selbp.SelectiveBackprop(wrapped, selector=rule, keep=0.25, target="global")
    loss = step(*data(rank))
    exact = full_gradient(plain)
    check_close(rule.mean.head_weight, exact[2])
    check_close(rule.mean.head_bias, exact[3])
    check_close(rule.mean.target_sq, exact[2].square().sum() + exact[3].square().sum())
    x, y = data(rank)
    own = [
        torch.autograd.grad(F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]), plain[2].weight)[0] for i in range(N)
    ]
    bias = [torch.autograd.grad(F.cross_entropy(plain(x[i : i + 1]), y[i : i + 1]), plain[2].bias)[0] for i in range(N)]
    inner = [(g * exact[2]).sum() + (b * exact[3]).sum() for g, b in zip(own, bias, strict=True)]
    check_close(rule.mean.inner, torch.stack(inner))
    loss.backward()
    assert 0.0 < step.report.relative_residual < 10.0


class OfProducts(selbp.BaseSelector):
    """Reads inner products of gradients, and no mean."""

    needs = "gradients"

    def choose(self, rows, k):
        return rows.pick(rows.gradients.gram().diagonal(), k)


def a_report_waits_for_no_rank(rank):
    own = {"loss": lambda z, y: F.cross_entropy(z, y, reduction="none")}
    for rule in (OfProducts(), selbp.GradientMatching(), selbp.DivBS(), selbp.TopLoss(weights="refit")):
        for extra in ({}, {"micro_batch": 6}, {"head_gradient": "full"}, own):
            step = selbp.SelectiveBackprop(
                DistributedDataParallel(network()), selector=rule, keep=0.25, target="global", **extra
            )
            step.backward(*data(rank))
            with mock.patch("torch.distributed.all_reduce", side_effect=AssertionError("a report waits for a rank")):
                figures = step.report.as_dict()
            known = not isinstance(rule, OfProducts) or "head_gradient" in extra
            assert all((figures[name] is not None) == known for name in ("gain", "relative_residual")), (rule, extra)


def test_two_processes():
    in_two_processes(check_all)


def check_compiled(rank):
    for kind in ("matching", "recomputed", "cut"):
        every_step_is_averaged(rank, "static_graph, compiled", kind)


@pytest.mark.slow
def test_compiled_in_two_processes():
    in_two_processes(check_compiled)


def wrapped(static, compiled):
    ddp = DistributedDataParallel(network(), static_graph=static)
    return torch.compile(ddp, backend="eager") if compiled else ddp


def averaged(model, losses):
    """Whether the ranks have one gradient after the backward of each of ``losses``."""
    for loss in losses:
        model.zero_grad()
        loss().backward()
        for p in model.parameters():
            other = p.grad.clone()
            dist.broadcast(other, 0)
            if not torch.equal(p.grad, other):
                return False
    return True


def check_looks_ahead(rank):
    """A look at a wrapped model, compiled or not, is none of the iterations that the wrapper counts."""
    batch = data(rank)
    for static in (False, True):
        for compiled in (False, True):
            case = static, compiled
            model = wrapped(*case)
            step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)  # backward="auto"
            assert averaged(model, [lambda turn=turn, step=step: step(*data(rank, turn)) for turn in range(3)]), case
            with pytest.raises(ValueError, match="one process for a CUDA graph"):
                check_graph(step, batch, None)

            model = wrapped(*case)
            if rank == 0:  # on its own
                selbp.diagnose(model, batch, keep=0.25)
            assert averaged(model, [lambda model=model: F.cross_entropy(model(batch[0]), batch[1])] * 3), case

            model = wrapped(*case)
            options = {"keep": 0.25, "selector": selbp.GradientMatching(), "steps": 1}
            if static:
                with pytest.raises(ValueError, match="static_graph=True.*before it is wrapped"):
                    selbp.diagnose(model, batch, **options)
            else:
                selbp.diagnose(model, batch, **options)
            assert averaged(model, [lambda model=model: F.cross_entropy(model(batch[0]), batch[1])] * 3), case


def test_looks_ahead_in_two_processes():
    in_two_processes(check_looks_ahead)
