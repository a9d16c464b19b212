"""A state that does not fit is a ValueError and changes nothing, whatever in it is missing or of another kind."""

import copy

import pytest
import torch
from support.sampling_kit import data, known_table, model
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

import selbp
from selbp.integrations.sampled import Sampled
from selbp.sampling import info_batch
from selbp_study.ideas import AveragedTarget


def trained():
    """A controller in the middle of an epoch, with everything that it is made of."""
    torch.manual_seed(0)
    auto = selbp.auto_select(model(), data(), classes=4, k=8, pool=40, proxy=False)
    auto.trial = 1
    for turn, (x, y) in enumerate(DataLoader(data(), batch_sampler=auto.sampler, num_workers=0)):
        auto(x, y).backward()
        if turn == 3:
            break
    return auto


def sampled():
    drawn = Sampled({"classes": 4, "k": 8, "pool": 40, "proxy": False}, 8, None)
    loader = drawn.loader(data(), data())
    auto = drawn.control(selbp.SelectiveBackprop(model(), selector=selbp.Full(), keep=1.0, table=drawn.table))
    x, y = next(iter(loader))
    auto(x, y).backward()
    return drawn


def with_info_batch():
    sampler = info_batch(known_table(), k=4, epochs=4)
    next(iter(sampler))
    return sampler


def with_memory(rule):
    generator = torch.Generator().manual_seed(0)
    step = selbp.SelectiveBackprop(model(), selector=rule, keep=2, generator=generator)
    step(torch.randn(8, 6), torch.randint(0, 4, (8,)))
    return step


def inserted():
    return selbp.insert_cut(model(), "1", keep=2, generator=torch.Generator().manual_seed(0))


MADE = {
    "controller": trained,
    "sampler": lambda: trained().sampler,
    "table": lambda: trained().table,
    "table of a transition": lambda: known_table(noise="class"),
    "sampling": sampled,
    "info_batch": with_info_batch,
    "step": lambda: with_memory(selbp.LossPercentile(history=16)),
    "cut": inserted,
    "percentile": lambda: with_memory(selbp.LossPercentile(history=16)).selector,
    "importance": lambda: with_memory(selbp.GradNormImportance()).selector,
    "average": lambda: with_memory(AveragedTarget()).selector,
}


ADDED = ("price", "classes_last", "buffers")  # entries that states were once saved without


class Other:
    """What no state holds."""


def places(state, path=()):
    """Where an entry is: the keys on the way to each, of all dicts and lists in the state."""
    parts = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(state, path, change):
    state = copy.deepcopy(state)
    holder = state
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return state


def same(one, two):
    (a, kind), (b, other) = pytree.tree_flatten(one), pytree.tree_flatten(two)
    return kind == other and all(
        torch.equal(x.nan_to_num(), y.nan_to_num()) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", MADE)
def test_a_refused_state_changes_nothing(name):
    one = MADE[name]()
    state = copy.deepcopy(one.state_dict())
    assert same(state, one.state_dict())
    # Of a list another length may be right; what a decision or a tag was called is not read again.
    for path in places(state):
        changes = [lambda holder, key: holder.__setitem__(key, Other())]
        if not isinstance(path[-1], int) and path[-1] not in ADDED:
            changes.append(lambda holder, key: holder.pop(key))
        for change in changes:
            try:
                one.load_state_dict(changed(state, path, change))
            except ValueError:
                assert same(one.state_dict(), state), path
            else:
                assert "log" in path or path[-1] in ("tag", "recorded"), path
                one.load_state_dict(state)
    for wrong in (None, [], 3, {}):
        with pytest.raises(ValueError, match="must have the entries"):
            one.load_state_dict(wrong)
    assert same(one.state_dict(), state)


def test_no_part_takes_over_its_state_where_another_refuses():
    drawn, other = sampled(), sampled()
    before, state = copy.deepcopy(drawn.state_dict()), other.state_dict()
    state["table"]["probability"].fill_(0.5)
    state["sampler"]["epoch"] = 7
    with pytest.raises(ValueError, match="the state's current must be one of"):
        drawn.load_state_dict({**state, "controller": {**state["controller"], "current": "other"}})
    assert same(drawn.state_dict(), before)
    drawn.load_state_dict(state)
    assert same(drawn.state_dict(), state)


@pytest.mark.parametrize("wrong", [{"weights": torch.ones(3)}, {"uniform": 99}], ids=["weights", "uniform"])
def test_a_batch_to_be_handed_out_again_must_be_one(wrong):
    sampler = trained().sampler
    next(iter(sampler))  # fetched, and not yet trained on
    state = copy.deepcopy(sampler.state_dict())
    before = copy.deepcopy(state)
    state["issued"][0].update(wrong)
    with pytest.raises(ValueError, match="a batch in the state's issued has 8 ids"):
        sampler.load_state_dict(state)
    assert same(sampler.state_dict(), before)
