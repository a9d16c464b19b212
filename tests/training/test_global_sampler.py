"""A table's sampler with ``scope="global"``: ranks draw from their shards, and choose and learn as one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_processes
from support.sampling_kit import data, known_table, model
from support.training_kit import TokenModel, assert_same
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import selbp
from selbp.integrations.sampled import Sampled
from selbp.sampling import AutoSelect, Candidate, Draw, NoiseAwareCrossEntropy, ScoredBatchSampler, ScoreTable
from selbp.sampling import auto as controller
from selbp.training.drawn import digest

EXACT = 1e-12
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of a table's columns
N = 80


def table(classes: int | None = 4, **options: Any) -> ScoreTable:
    """What is known of every second sample, so that shards differ and new samples come."""
    made = known_table(N, **options) if classes else ScoreTable(N)
    made.forget(torch.arange(0, N, 4))
    made.label.fill_(-1)
    made.irreducible = torch.linspace(0, 1, N)
    return made


def double() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    x, y = data(N).tensors
    return model().double(), x.double(), y


def alike(value: Any) -> Any:
    """``value``, which every rank must have."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    assert all(str(other) == str(said[0]) for other in said), said
    return value


def same(mine: ScoreTable) -> None:
    alike(int(digest(mine)))


def together(draw: Draw) -> tuple[Draw, torch.Tensor]:
    """All ranks' draws as one process would have drawn them, uniform rows first, and its order."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, draw)
    uniform = torch.cat([torch.arange(len(d.ids)) < d.uniform for d in every])
    order = torch.cat([uniform.nonzero()[:, 0], (~uniform).nonzero()[:, 0]])
    weights = None if draw.weights is None else torch.cat([d.weights for d in every])[order]
    return Draw(torch.cat([d.ids for d in every])[order], int(uniform.sum()), weights), order


CASES: dict[str, dict[str, Any]] = {
    "largest losses": {"selector": selbp.TopLoss()},
    "matching": {"selector": selbp.GradientMatching()},
    "reducible losses": {"selector": selbp.ReducibleLoss()},
    "rows at random": {"selector": selbp.Random(), "uniform": 1.0},
    "all rows": {"selector": selbp.Full(), "keep": 1.0},
    "unbiased": {"selector": selbp.Full(), "keep": 1.0, "weights": "unbiased"},
    "unbiased and chosen": {"selector": selbp.TopLoss(), "weights": "unbiased"},
    "micro-batches": {"selector": selbp.TopLoss(), "micro_batch": 2},
    "no classes": {"selector": selbp.TopLoss(), "classes": None},
    "a transition": {"selector": selbp.TopLoss(), "noise": "class"},
}


def check_as_one(rank: int, case: str) -> None:
    """Gradients, choices and tables are those of one process that was handed all ranks' batches."""
    options = {"keep": 0.25, **CASES[case]}
    drawing = {name: options.pop(name) for name in ("uniform", "weights") if name in options}
    known = {name: options.pop(name) for name in ("classes", "noise") if name in options}
    (ours, x, y), (theirs, _, _) = double(), double()
    tables = [table(**known) for _ in range(2)]
    sampler = ScoredBatchSampler(tables[0], 12, 18, **{"uniform": 0.3, **drawing})
    assert (sampler.rank, sampler.world_size) == (rank, 2)
    losses: list[Any] = [NoiseAwareCrossEntropy(t) if t.classes else "cross_entropy" for t in tables]
    seeds = [torch.Generator().manual_seed(6) for _ in range(2)]
    step = selbp.SelectiveBackprop(
        DistributedDataParallel(ours),
        scope="global",
        table=tables[0],
        loss=losses[0],
        generator=seeds[0],
        **options,
    )
    options.pop("micro_batch", None)
    one = selbp.SelectiveBackprop(
        theirs, backward="recompute", table=tables[1], loss=losses[1], generator=seeds[1], **options
    )
    token = tables[1].issued.begin(sampler)

    def drawn() -> Iterator[list[int]]:
        for _ in range(2):
            tables[1].refresh()  # as a sampler does at an epoch's start
            yield from sampler

    for ids in drawn():
        whole, order = together(tables[0].issued.draws[0])
        assert len(set(whole.ids.tolist())) == 24  # no sample twice
        tables[1].issued.add(whole, token)
        step.backward(x[ids], y[ids])
        one.backward(x[whole.ids], y[whole.ids])
        assert set(order[one.report.selection.indices].tolist()) == set(step.report.selection.indices.tolist())
        for got, want in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(got.grad, want.grad, rtol=EXACT, atol=EXACT)
            got.grad = want.grad = None
        assert not tables[0].issued.draws
        same(tables[0])
        compare(tables[0], tables[1])
    assert tables[0].coverage > 0 and int((tables[0].seen > 0)[1 - rank :: 2].sum()) > 0  # of the other rank's samples


def compare(mine: ScoreTable, one: ScoreTable) -> None:
    got, want = mine.state_dict(), one.state_dict()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                got[name], value, rtol=ROUNDING, atol=ROUNDING, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert got[name] == (pytest.approx(value) if isinstance(value, float) else value), name


class Run:
    """A training whose every part has a state, with the controller's two candidates by turns."""

    def __init__(self) -> None:
        self.table = table()
        self.sampler = ScoredBatchSampler(self.table, k=6, pool=10, weights="unbiased")
        self.loader = DataLoader(data(N), batch_sampler=self.sampler)
        self.batches = (batch for _ in range(9) for batch in self.loader)
        self.model = model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step = selbp.SelectiveBackprop(
            DistributedDataParallel(self.model),
            selector=selbp.TopLoss(),
            keep=0.5,
            loss=NoiseAwareCrossEntropy(self.table),
            table=self.table,
            scope="global",
        )
        self.auto = AutoSelect(self.step, self.sampler, random_k=4, prices={"random": 1.0, "drawn": 0.1}, every=3)

    def parts(self) -> tuple[Any, ...]:
        return self.table, self.sampler, self.model, self.optimizer, self.step, self.auto

    def go(self, steps: int) -> list[Any]:
        ids = []
        for x, y in islice(self.batches, steps):
            ids.append((self.table.issued.draws[0].ids.tolist(), self.auto.current))
            self.auto(x, y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return ids


def check_resume(rank: int) -> None:
    whole = Run()
    whole.go(6)  # an epoch has four
    saved = copy.deepcopy([part.state_dict() for part in whole.parts()])
    rest = whole.go(7)
    again = Run()
    for part, state in zip(again.parts(), saved, strict=True):
        part.load_state_dict(state)
    assert again.go(7) == rest and rest[-1][1] == "drawn"
    for run in (whole, again):
        same(run.table)
        alike([p.tolist() for p in run.model.parameters()])
    assert_same(dict(again.model.named_parameters()), dict(whole.model.named_parameters()), rtol=0)
    assert int(digest(again.table)) == int(digest(whole.table))


class Clock:
    """Moves on by what each candidate's step takes on this rank."""

    def __init__(self) -> None:
        self.now = 0.0

    def process_time(self) -> float:
        return self.now


def check_controller(rank: int, seconds: list[dict[str, float]], chosen: str) -> None:
    """Ranks whose clocks say different things decide alike, by the mean."""
    clock = Clock()
    controller.time = clock  # type: ignore[assignment]  # this process ends with the check
    scores, network = known_table(N), model()
    sampler = ScoredBatchSampler(scores, 6, 10)
    step = selbp.SelectiveBackprop(network, selector=selbp.Full(), keep=1.0, table=scores, scope="global")
    auto, (x, y) = AutoSelect(step, sampler, every=5, trial=2), data(N).tensors
    scores.label.fill_(-1)
    for ids in islice((ids for _ in range(20) for ids in sampler), 40):
        scores._averages.state[2:] = torch.tensor([1.0, 2.0])  # the headroom is 2
        name = scores.issued.draws[0].tag
        auto(x[ids], y[ids]).backward()
        clock.now += seconds[rank][name]
        alike((name, auto.current, auto.prices))
    assert auto.current == chosen
    mean = {name: sum(each[name] for each in seconds) / 2 for name in seconds[0]}
    assert auto.prices == pytest.approx({name: value / mean["random"] for name, value in mean.items()})


def check_in_a_trainer(rank: int) -> None:
    """A trainer makes its step after table and controller: ranks decide alike, and begin with one table."""
    clock, seconds = Clock(), {"random": 1.0, "drawn": 0.5 if rank == 0 else 2.0}
    controller.time = clock  # type: ignore[assignment]  # this process ends with the check
    samples, network = data(400), model()
    sampled = Sampled({"classes": 4, "pool": 8, "noise": "none", "every": 5, "trial": 2}, 4, None)
    loader = sampled.loader(samples, samples)
    if rank == 1:  # as where its proxy had less time
        sampled.table.probability[7] = torch.nan
    options = {**sampled.step_options, "selector": selbp.TopLoss(), "keep": 0.5, "scope": "global"}
    batches = islice((batch for _ in range(3) for batch in loader), 40)
    x, y = next(batches)  # a loader reads ahead of the step
    auto = sampled.control(selbp.SelectiveBackprop(DistributedDataParallel(network), **options))
    same(sampled.table)
    for inputs, target in chain([(x, y)], batches):
        name = sampled.table.issued.draws[0].tag
        auto(inputs, target).backward()
        clock.now += seconds[name]
        alike((name, auto.current, auto.prices))
    assert auto.prices == pytest.approx({"random": 1.0, "drawn": 1.25})


def check_sequences(rank: int) -> None:
    """A table without classes is told each sequence's own mean, whichever rank it came to."""
    tokens = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for row in range(6):
        labels[row, 8 - row :] = -100
    mine = torch.arange(3 * rank, 3 * rank + 3)
    long = 9 - 3 * rank  # a rank's sequences are padded to its own longest
    network = TokenModel().double()
    with torch.no_grad():
        found = F.cross_entropy(network(tokens)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    want = (-found.sum(1) / labels[:, 1:].ne(-100).sum(1)).exp().float()
    for rule, keep in ((selbp.Full(), 1.0), (selbp.TopLoss(), 0.5)):
        scores = ScoreTable(6)
        step = selbp.SelectiveBackprop(
            DistributedDataParallel(network), selector=rule, keep=keep, loss="causal_lm", table=scores, scope="global"
        )
        step.backward(tokens[mine, :long], labels[mine, :long], ids=mine)
        torch.testing.assert_close(scores.probability, want, rtol=ROUNDING, atol=ROUNDING)


def check_refusals(rank: int) -> None:
    """What would train the same samples twice, or tell the tables different things, is refused on every rank."""
    (network, x, y), options = double(), {"selector": selbp.Full(), "keep": 1.0, "scope": "global"}
    shard = {"rank": rank, "world_size": 2}

    def step_on(scores: ScoreTable, drawing: dict[str, int], **use: Any) -> selbp.SelectiveBackprop:
        step = selbp.SelectiveBackprop(network, table=scores, **options)
        sampler = ScoredBatchSampler(scores, 6, 10, **drawing)
        sampler.use(**use)
        step(x[ids := next(iter(sampler))], y[ids]).backward()
        return step

    for drawing in ({"rank": 0, "world_size": 1}, {"rank": 1, "world_size": 3}):
        with pytest.raises(ValueError, match=f"got rank={drawing['rank']} of .*make the sampler after"):
            step_on(table(), drawing)
    with pytest.raises(ValueError, match=f"got rank={0} of world_size=2, rank=1 of world_size=3"):
        step_on(table(), {"rank": rank, "world_size": 2 + rank})
    with pytest.raises(ValueError, match="batches of one kind on all ranks, got 'a' on rank 0 and 'b' on rank 1"):
        step_on(table(), shard, tag="ab"[rank])
    other = table()
    if rank == 1:
        other.probability[7] += 0.125
    with pytest.raises(ValueError, match="needs the same table on every rank: .* load one rank's state_dict"):
        step_on(other, shard)
    state: list[Any] = [other.state_dict()]
    dist.broadcast_object_list(state)
    other.load_state_dict(state[0])
    step_on(other, shard)
    step = step_on(table(), shard)
    ids = torch.arange(6)  # numbers that the caller passes may be those of another rank too
    step(x[ids], y[ids], ids=ids).backward()
    assert step.table is not None
    same(step.table)


def check_all_in_one(rank: int) -> None:
    """``auto_select``: every rank begins with rank 0's table, whatever its own proxy found."""
    samples, network = data(400), model()
    longer = Subset(samples, range(400)) if rank == 0 else Subset(samples, range(399, -1, -1))  # another scan
    auto = selbp.auto_select(
        DistributedDataParallel(network),
        longer,
        classes=4,
        k=8,
        pool=16,
        scope="global",
        selector=selbp.TopLoss(),
        keep=4,
    )
    same(auto.sampler.table)
    auto.sampler.table.label.fill_(-1)
    for x, y in islice(DataLoader(samples, batch_sampler=auto.sampler), 4):
        auto(x, y).backward()
    assert (auto.report.n, auto.report.k) == (16, 8)
    same(auto.sampler.table)


def check_two(rank: int) -> None:
    for case in CASES:
        try:
            check_as_one(rank, case)
        except AssertionError as error:
            raise AssertionError(f"{case}, rank {rank}: {error}") from error
    check_resume(rank)
    check_refusals(rank)
    check_all_in_one(rank)
    check_in_a_trainer(rank)
    check_sequences(rank)
    own = [{"random": 1.0, "drawn": 0.5}, {"random": 1.0, "drawn": 5.0}]  # each rank alone would choose another one
    check_controller(rank, own, "random")
    check_controller(rank, [own[0], {"random": 1.0, "drawn": 2.5}], "drawn")


def test_two_processes() -> None:
    in_processes(2, check_two)


@pytest.mark.parametrize(
    "options", [{"micro_batch": 2}, {"scope": "global"}, {}], ids=["micro-batches", "global", "plain"]
)
def test_a_batch_that_is_not_to_be_recorded_is_not(options: dict[str, Any]) -> None:
    scores, (network, x, y) = table(), double()
    sampler = ScoredBatchSampler(scores, 6, 10)
    sampler.use(record_every=4)
    step = selbp.SelectiveBackprop(network, selector=selbp.TopLoss(), keep=3, table=scores, **options)
    for ids in sampler:
        step.backward(x[ids], y[ids])
    assert len(sampler) == 8 and scores.state_dict()["time"] == 2


def test_candidates_of_two_scopes_are_refused() -> None:
    scores, network = table(), model()
    steps = [
        selbp.SelectiveBackprop(network, selector=selbp.Full(), keep=1.0, table=scores, scope=scope)
        for scope in ("local", "global")
    ]
    with pytest.raises(ValueError, match="the steps of 'random' and 'wide' must have one scope"):
        AutoSelect(steps[0], ScoredBatchSampler(scores, 6, 10), others={"wide": Candidate(steps[1])})
