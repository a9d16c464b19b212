"""``scope="global"``: the ranks choose among all their samples as one process would that holds them."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_processes
from support.training_kit import TokenModel, assert_same, mlp
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.common.exchange import Plan

EXACT = 1e-12
SIZES = [12, 9, 12, 5]  # of the ranks' minibatches: the last one of an epoch is ragged


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


class Picture(nn.Module):
    """Images (n, 3, 4, 4) in channels-last memory, a mask and half-precision hints."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3).double(), nn.Linear(6, 5).double()

    def forward(self, image: torch.Tensor, mask: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        assert image.is_contiguous(memory_format=torch.channels_last)
        pooled = torch.tanh(self.body(image)).mean((2, 3))
        return self.head(torch.where(mask[:, None], pooled, pooled + hint.double()))


def vectors(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    x, y = torch.randn(n, 12).double(), torch.randint(0, 5, (n,))
    x[3, 1], y[8] = math.nan, -100
    return mlp().double(), x, y


def mixed(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    image = torch.randn(n, 3, 4, 4).double().contiguous(memory_format=torch.channels_last)
    inputs = image, torch.rand(n) > 0.5, torch.randn(n, 1).to(torch.bfloat16)
    return Picture(), inputs, torch.randint(0, 5, (n,))


def tokens(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    ids = torch.randint(0, 11, (n, 6))
    labels = ids.clone()
    labels[torch.arange(6) >= torch.randint(2, 7, (n, 1))] = -100
    return TokenModel().double(), {"input_ids": ids}, labels


def part(tree: Any, rows: slice) -> Any:
    if isinstance(tree, dict):
        return {name: part(x, rows) for name, x in tree.items()}
    return tuple(part(x, rows) for x in tree) if isinstance(tree, tuple) else tree[rows]


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "top loss": (vectors, {"selector": selbp.TopLoss()}),
    "refitted norms": (vectors, {"selector": selbp.TopGradNorm(weights="refit")}),
    "matching": (vectors, {"selector": selbp.GradientMatching()}),
    "matching a tuple": (mixed, {"selector": selbp.GradientMatching(), "scoring": "eval"}),
    "matching tokens of a dict": (tokens, {"selector": selbp.GradientMatching(), "loss": "causal_lm"}),
    "without logits": (tokens, {"selector": selbp.GradientMatching(), "loss": "linear_causal_lm"}),
    "sketched": (tokens, {"selector": selbp.GradientMatching(), "loss": "causal_lm", "proxy": "sketch"}),
    "loss percentile": (vectors, {"selector": selbp.LossPercentile}),
    "random": (vectors, {"selector": selbp.Random()}),
    "full": (tokens, {"selector": selbp.Full(), "loss": "causal_lm"}),
    "full head": (vectors, {"selector": selbp.GradientMatching(), "head_gradient": "full"}),
    "micro-batches": (vectors, {"selector": selbp.GradientMatching(), "micro_batch": 2}),
    "what the caller knows": (vectors, {"selector": selbp.ReducibleLoss()}),
    "fewer than ranks": (vectors, {"selector": selbp.TopLoss()}),
    "more than may count": (vectors, {"selector": selbp.Random()}),
    "a schedule": (vectors, {"selector": selbp.TopLoss(), "schedule": selbp.Schedule(1, None, 2, "random")}),
}


def steps(case: str, sizes: list[int], rank: int | None, turns: int = 3) -> tuple[list[Any], list[Any]]:
    """Gradients and reports: of a rank with its part of the samples, or for None of one process that has them all."""
    torch.manual_seed(5)
    make, options = CASES[case]
    keep = {"fewer than ranks": 0.04, "more than may count": 0.97}.get(case, 0.25)
    total, first = sum(sizes), 0 if rank is None else sum(sizes[:rank])
    rows = slice(0, total) if rank is None else slice(first, first + sizes[rank])
    options = dict(options, generator=torch.Generator().manual_seed(2))
    if isinstance(options["selector"], type):
        options["selector"] = options["selector"]()
    model, _, _ = make(total)
    if rank is None:
        options.pop("micro_batch", None)
        step = selbp.SelectiveBackprop(model, keep=keep, backward="recompute", **options)
    else:
        model = DistributedDataParallel(model)
        step = selbp.SelectiveBackprop(model, keep=keep, scope="global", **options)
    found, reports = [], []
    for turn in range(turns):
        torch.manual_seed(turn)
        _, inputs, target = make(total)
        known = {"irreducible_loss": torch.rand(total).double()} if case == "what the caller knows" else {}
        here = {name: x[rows] for name, x in known.items()}
        loss = step.backward(part(inputs, rows), target[rows], **here)
        assert float(loss) == step.report.loss
        found.append(gradients(model))
        reports.append(step.report)
    return found, reports


def check_exact(rank: int, sizes: list[int]) -> None:
    for case in CASES:
        want, one = steps(case, sizes, None)
        got, mine = steps(case, sizes, rank)
        for turn in range(len(want)):
            try:
                compare(got[turn], want[turn], mine[turn], one[turn])
            except AssertionError as error:
                raise AssertionError(f"{case}, step {turn}, rank {rank}: {error}") from error


def compare(got: Any, want: Any, mine: selbp.StepReport, one: selbp.StepReport) -> None:
    assert_same(got, want, rtol=EXACT)
    assert torch.equal(mine.selection.indices, one.selection.indices)
    assert (mine.n, mine.k, mine.selected, mine.scored) == (one.n, one.k, one.selected, one.scored)
    assert mine.loss == pytest.approx(one.loss, rel=1e-12) and mine.accuracy == one.accuracy
    assert mine.weight_sum == pytest.approx(one.weight_sum, rel=1e-12)


def counted(model: nn.Module) -> list[int]:
    """Counts the rows of each forward that trains."""
    seen: list[int] = []

    def note(module: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(len(args[0]))

    model.register_forward_pre_hook(note)
    return seen


def check_shares(rank: int, size: int) -> None:
    """Every rank trains k rows, though all of the best ones came to the last rank; DDP averages once a step."""
    torch.manual_seed(0)
    inner = mlp()
    seen = counted(inner)
    model = DistributedDataParallel(inner)
    reductions = []

    def hook(state, bucket):
        reductions.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    x = torch.randn(16, 12)
    with torch.no_grad():
        y = inner(x).argmin(1) if rank == size - 1 else inner(x).argmax(1)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, scope="global", micro_batch=3)
    step.backward(x, y)
    assert seen[-3:] == [3, 3, 2] and step.report.k == 8 * size
    came = step.report.selection.indices >= 16 * (size - 1)
    assert came.sum() > 8
    assert len(reductions) == 1
    with model.no_sync():  # of the caller's own, around one of several steps
        step.backward(x, y)
    assert len(reductions) == 1
    step.backward(x, y)
    assert len(reductions) == 2


def check_draws(rank: int) -> None:
    """Without a generator, all ranks draw from rank 0's seed, and a resumed step goes on where it stood."""
    torch.manual_seed(100 + rank)
    model = mlp()
    x, y = torch.randn(16, 12), torch.randint(0, 5, (16,))

    def chosen(step: selbp.SelectiveBackprop) -> torch.Tensor:
        step(x, y)
        parts = [torch.empty_like(step.report.selection.indices) for _ in range(2)]
        dist.all_gather(parts, step.report.selection.indices)
        assert torch.equal(*parts)
        return parts[0]

    step = selbp.SelectiveBackprop(model, selector=selbp.Random(), keep=0.25, scope="global")
    first = chosen(step)
    state = step.state_dict()
    second = chosen(step)
    assert not torch.equal(first, second)
    again = selbp.SelectiveBackprop(model, selector=selbp.Random(), keep=0.25, scope="global")
    again.load_state_dict(state)
    assert torch.equal(chosen(again), second)


class Own(selbp.TopLoss):
    """Chooses by which rank asks."""

    def select(self, stats: Any, k: int, **options: Any) -> selbp.Selection:
        indices, weights = super().select(stats, k, **options)
        return selbp.Selection(indices.roll(dist.get_rank()), weights)


def check_refusals(rank: int) -> None:
    """All ranks raise alike, and the next step runs."""
    model, y = mlp(), torch.randint(0, 5, (16,))
    options: dict[str, Any] = {"selector": selbp.TopLoss(), "keep": 0.25, "scope": "global"}
    step = selbp.SelectiveBackprop(model, **options)
    with pytest.raises(ValueError, match="but for the number of samples"):
        step(torch.randn(16, 12 + rank), y)
    with pytest.raises(ValueError, match="a list of n.* on rank 0 and .*a tuple of n.* on rank 1"):
        step((torch.randn(16, 12), [["a"] * 16, ("a",) * 16][rank]), y)
    step(torch.randn(16, 12), y)
    static = DistributedDataParallel(mlp(), static_graph=True)
    with pytest.raises(ValueError, match="without static_graph=True"):
        selbp.SelectiveBackprop(static, selector=selbp.TopLoss(), keep=0.25, micro_batch=4)
    different = selbp.SelectiveBackprop(model, generator=torch.Generator().manual_seed(rank), **options)
    with pytest.raises(ValueError, match="the same random draws on every rank"):
        different(torch.randn(16, 12), y)
    own = selbp.SelectiveBackprop(model, **{**options, "selector": Own()})
    with pytest.raises(ValueError, match="the same choice on every rank"):
        own(torch.randn(16, 12), y)


def check_second_pass(rank: int) -> None:
    """Given rows, such as those of SAM's second pass, are of all ranks' samples too."""
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp().double())
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, scope="global")
    x, y = torch.randn(2, 16, 12).double(), torch.randint(0, 5, (2, 16))
    step(x[rank], y[rank]).backward()
    first, selection = gradients(model), step.report.selection
    step(x[rank], y[rank], selection=selection).backward()
    assert_same(gradients(model), first, rtol=EXACT)
    some = selbp.Selection(selection.indices[:5], selection.weights[:5])  # that do not divide
    step(x[rank], y[rank], selection=some).backward()
    losses = F.cross_entropy(model.module(x.flatten(0, 1)), y.flatten(), reduction="none")
    want = torch.autograd.grad(losses[some.indices] @ some.weights, list(model.parameters()))
    for got, exact in zip(gradients(model).values(), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=EXACT, atol=1e-15)


class EveryRow(selbp.Full):
    """Full, but chosen after a forward that scores."""

    needs = "gradients"


def check_unlabelled(rank: int) -> None:
    """Where all rows are kept, each rank's batch norm sees its own minibatch as it came, labelled or not."""
    for rule in (selbp.Full(), EveryRow(), selbp.Random()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double()
        plain = copy.deepcopy(model)
        x, y = torch.randn(2, 16, 12).double() + 3.0, torch.randint(0, 5, (2, 16))
        y[0, :9], y[1, 4] = -100, -100
        parallel = DistributedDataParallel(model, broadcast_buffers=False)
        step = selbp.SelectiveBackprop(parallel, selector=rule, keep=1.0, scope="global")
        step(x[rank], y[rank]).backward()
        for other in (1 - rank, rank):
            plain[1].reset_running_stats()  # in the end they are of the rank's own minibatch
            (F.cross_entropy(plain(x[other]), y[other], reduction="sum") / (y != -100).sum()).backward()
        assert_same(gradients(parallel), gradients(plain), rtol=EXACT)
        torch.testing.assert_close(model[1].running_mean, plain[1].running_mean, rtol=EXACT, atol=0)


def check_table(rank: int) -> None:
    """Every rank's table, whose columns are float32, is that of one process."""
    rounding = 8 * torch.finfo(torch.float32).eps
    labels = torch.randint(0, 5, (64,), generator=torch.Generator().manual_seed(8))
    for classes in (5, None):
        for rule in (selbp.TopLoss(), selbp.Random()):
            tables = [selbp.sampling.ScoreTable(64, classes) for _ in range(2)]
            torch.manual_seed(4)
            model, other = mlp().double(), mlp().double()
            other.load_state_dict(model.state_dict())
            seeds = [torch.Generator().manual_seed(6) for _ in range(2)]
            options: dict[str, Any] = {"selector": rule, "keep": 0.25}
            ours = selbp.SelectiveBackprop(
                DistributedDataParallel(model), scope="global", table=tables[0], generator=seeds[0], **options
            )
            one = selbp.SelectiveBackprop(other, backward="recompute", table=tables[1], generator=seeds[1], **options)
            for turn in range(2):
                torch.manual_seed(turn)
                ids, x = torch.randperm(64)[:21], torch.randn(21, 12).double()
                rows = slice(0, 12) if rank == 0 else slice(12, 21)
                ours(x[rows], labels[ids[rows]], ids=ids[rows]).backward()
                one(x, labels[ids], ids=ids).backward()
                assert torch.equal(ours.report.selection.indices, one.report.selection.indices)
            for name, want in tables[1].state_dict().items():
                got = tables[0].state_dict()[name]
                if isinstance(want, torch.Tensor):
                    torch.testing.assert_close(
                        got, want, rtol=rounding, atol=rounding, equal_nan=True, msg=f"{name} {rule!r}"
                    )
                else:
                    assert got == pytest.approx(want, nan_ok=True) if isinstance(want, float) else got == want, name
            assert tables[0].coverage == tables[1].coverage > 0
    with pytest.raises(RuntimeError, match="which samples are these"):
        ours(x[rows], labels[ids[rows]])


def check_two(rank: int) -> None:
    check_exact(rank, SIZES[:2])
    check_shares(rank, 2)
    check_draws(rank)
    check_refusals(rank)
    check_second_pass(rank)
    check_unlabelled(rank)
    check_table(rank)


def check_four(rank: int) -> None:
    check_exact(rank, SIZES)
    check_shares(rank, 4)


def test_two_processes() -> None:
    in_processes(2, check_two)


@pytest.mark.slow
def test_four_processes() -> None:
    in_processes(4, check_four)


@pytest.mark.parametrize(
    ("rows", "quotas", "ways"),
    [
        ([0, 5, 9], [1, 1, 1], {(0, 0): [0], (1, 1): [1], (2, 2): [2]}),
        ([11, 8, 10, 9], [2, 1, 1], {(2, 2): [0], (2, 0): [1, 2], (2, 1): [3]}),  # all of one rank's
        ([3, 0, 6, 1], [1, 3, 0], {(0, 0): [0], (0, 1): [1, 3], (1, 1): [2]}),  # a rank that trains none
    ],
    ids=["none moves", "one gives", "one idle"],
)
def test_who_trains_what(rows: list[int], quotas: list[int], ways: dict[tuple[int, int], list[int]]) -> None:
    plan = Plan.of(rows, [4, 4, 4], quotas)
    assert plan.ways == ways
    assert [len(plan.slots(rank, 3)) for rank in range(3)] == quotas
    assert plan.moves == any(a != b for a, b in ways)


def test_one_process_is_all_ranks() -> None:
    want, _ = steps("matching", [20], None)
    for _ in range(1):
        torch.manual_seed(5)
        model, _, _ = vectors(20)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, scope="global")
        for turn in range(3):
            torch.manual_seed(turn)
            _, x, y = vectors(20)
            step(x, y).backward()
            assert_same(gradients(model), want[turn], rtol=EXACT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backward": "rows"}, 'scope="global" is for backward="recompute"'),
        ({"batchnorm": "subset"}, 'scope="global" is for backward="recompute"'),
        ({"cut": "0"}, 'scope="global" goes without cut='),
        ({"target": "global", "selector": selbp.GradientMatching()}, 'leave target="global" out'),
        ({"scope": "world"}, "scope must be 'local' or 'global', got 'world'"),
    ],
    ids=["rows", "subset", "cut", "target", "name"],
)
def test_what_cannot_work_is_refused_at_construction(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        selbp.SelectiveBackprop(mlp(), **{"selector": selbp.TopLoss(), "keep": 0.5, "scope": "global", **options})
