"""Epochs, shards and exact resume in the middle of an epoch, with workers that fetch ahead."""

import copy

import pytest
import torch
from support.sampling_kit import data, known_table, model
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

import selbp
from selbp.sampling import NoiseAwareCrossEntropy, ScoredBatchSampler, ScoreTable


def pools(sampler):
    order, count = sampler._plan["order"], len(sampler)
    return [order[i * len(order) // count : (i + 1) * len(order) // count].tolist() for i in range(count)]


def test_an_epochs_pools_are_a_partition_and_batches_come_from_them():
    sampler = ScoredBatchSampler(known_table(103), k=5, pool=20, seed=3)
    orders = []
    for _ in range(2):
        batches = list(sampler)
        found = pools(sampler)
        assert len(batches) == len(sampler) == len(found) == 5
        assert sorted(sum(found, [])) == list(range(103))
        assert all(len(set(b)) == 5 and set(b) <= set(p) for b, p in zip(batches, found, strict=True))
        assert {len(p) for p in found} == {20, 21}
        orders.append(found)
    assert orders[0] != orders[1]


def test_shards_are_disjoint_and_complete_and_equally_long():
    samplers = [ScoredBatchSampler(known_table(103), k=4, pool=8, rank=r, world_size=3) for r in range(3)]
    for sampler in samplers:
        list(sampler)
    assert sorted(sum((sum(pools(s), []) for s in samplers), [])) == list(range(103))
    assert len({len(s) for s in samplers}) == 1


class Run:
    """A training whose every part has a state."""

    def __init__(self, workers, **options):
        self.table = ScoreTable(200, 4)
        self.sampler = ScoredBatchSampler(self.table, k=8, pool=16, **options)
        self.loader = DataLoader(data(), batch_sampler=self.sampler, num_workers=workers)
        self.model = model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.step = selbp.SelectiveBackprop(
            self.model, selector=selbp.Full(), keep=1.0, loss=NoiseAwareCrossEntropy(self.table), table=self.table
        )

    def parts(self):
        return self.table, self.sampler, self.model, self.optimizer, self.step

    def go(self, steps):
        ids = []
        while len(ids) < steps:
            for x, y in self.loader:
                ids.append(self.table.issued.draws[0].ids.tolist())
                self.step(x, y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if len(ids) == steps:
                    break
        return ids


@pytest.mark.parametrize("stop", [5, 12, 30], ids=["middle", "end", "later"])
@pytest.mark.parametrize("options", [{}, {"weights": "unbiased"}], ids=["mean", "unbiased"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_draws_and_trains_as_if_it_had_not_stopped(workers, options, stop):
    whole = Run(workers, **options)
    saved, ids = None, []
    while len(ids) < stop + 15:
        for x, y in whole.loader:
            ids.append(whole.table.issued.draws[0].ids.tolist())
            whole.step(x, y).backward()
            whole.optimizer.step()
            whole.optimizer.zero_grad()
            if len(ids) == stop:
                saved = copy.deepcopy([part.state_dict() for part in whole.parts()])
            if len(ids) == stop + 15:
                break
    other = Run(workers, **options)
    for part, state in zip(other.parts(), saved, strict=True):
        part.load_state_dict(state)
    assert other.go(15) == ids[stop:]
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), other.model.parameters(), strict=True))
    assert torch.equal(whole.table.probability.nan_to_num(), other.table.probability.nan_to_num())


@pytest.mark.parametrize("taken", [0, 2])
def test_a_loaded_state_ends_the_iteration_that_is_running(taken):
    """Which would hand out what is to be handed out again."""
    one, other = (ScoredBatchSampler(known_table(40), k=4, pool=12, seed=5) for _ in range(2))
    fetched = iter(one)
    want = [next(fetched) for _ in range(3)]
    for _ in range(taken):
        one.skip()
    state = one.state_dict()
    want = [*want[taken:], *fetched]
    running = iter(other)
    next(running)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="a sampler's state was loaded.*begin to iterate anew"):
        next(running)
    assert list(other) == want


class Controlled:
    """A training by ``AutoSelect`` that draws from torch's generator: in dropout, and in a rule with a memory."""

    def __init__(self, rule):
        made, dataset = model(), data()
        self.model = torch.nn.Sequential(made[0], torch.nn.Dropout(0.2), *made[1:])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        auto = selbp.auto_select(self.model, dataset, classes=4, k=8, pool=40, selector=rule(), keep=0.5)
        step, prices = auto.step, {"random": 1.0, "drawn": 1.1}
        self.auto = selbp.AutoSelect(step, auto.sampler, prices=prices, every=3)
        self.loader = DataLoader(dataset, batch_sampler=auto.sampler, generator=torch.Generator())
        self.parts = [self.model, self.optimizer, self.schedule]
        self.parts += [self.auto.table, self.auto.sampler, step, self.auto]

    def go(self, steps):
        done = 0
        while done < steps:
            for x, y in self.loader:
                self.auto(x, y).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.schedule.step()
                done += 1
                if done == steps:
                    break

    def state(self):
        return copy.deepcopy([part.state_dict() for part in self.parts]), torch.get_rng_state()


@pytest.mark.parametrize("stop", [3, 5, 7], ids=["middle", "end", "later"])
@pytest.mark.parametrize("rule", [selbp.LossPercentile, selbp.GradNormImportance, selbp.Random])
def test_what_the_guide_tells_to_save_is_enough(rule, stop):
    stopped, whole = Controlled(rule), Controlled(rule)
    torch.manual_seed(2)
    stopped.go(stop)
    states, random = stopped.state()
    torch.manual_seed(2)
    whole.go(stop + 10)
    resumed = Controlled(rule)
    for part, state in zip(resumed.parts, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    assert resumed.auto.table.price == stopped.auto.report.price is not None
    resumed.go(10)
    assert "drawn" in {decision.chosen for decision in whole.auto.log}
    for a, b in zip(*map(pytree.tree_leaves, (resumed.state(), whole.state())), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"k": 9, "pool": 8}, "pool must be at least k"),
        ({"k": 50, "pool": 60}, "k must be at most a rank's 40 samples"),
        ({"k": 4, "uniform": 2}, "uniform must be finite"),
        ({"k": 4, "weights": "batch"}, "weights must be one of"),
        ({"k": 4, "weights": "unbiased", "floor": 0}, "floor must be above 0"),
        ({"k": 4, "rank": 0}, "rank and world_size go together"),
        ({"k": 4, "rank": 2, "world_size": 2}, "rank must be below"),
    ],
    ids=["k", "pool", "samples", "uniform", "weights", "floor", "rank", "range"],
)
def test_wrong_samplers_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        ScoredBatchSampler(known_table(40), **options)
