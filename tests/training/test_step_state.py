"""A saved and loaded step continues a run bit for bit; a state that does not fit changes nothing."""

import copy
import io

import pytest
import torch
from support.training_kit import assert_same_state, mlp, samples

import selbp

RULES = [
    selbp.Random,
    selbp.TopLoss,
    selbp.LossPercentile,
    selbp.LossRank,
    selbp.GradNormImportance,
    selbp.GradientMatching,
    selbp.DivBS,
]


def run(step, optimizer, batches):
    losses = []
    for x, y in batches:
        loss = step(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(rule, seed=1, state=None, between="full"):
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    step = selbp.SelectiveBackprop(
        model,
        selector=rule(),
        keep=0.25,
        generator=torch.Generator().manual_seed(seed),
        schedule=selbp.Schedule(start=1, every=2, between=between),
    )
    if state is not None:
        for part, saved in zip((model, optimizer, step), state, strict=True):
            part.load_state_dict(saved)
    return model, optimizer, step


@pytest.mark.parametrize("between", ["full", "random"])
@pytest.mark.parametrize("rule", RULES)
def test_a_round_trip_continues_bit_for_bit(rule, between):
    batches = [samples() for _ in range(9)]
    model, optimizer, step = build(rule, between=between)
    run(step, optimizer, batches[:4])
    file = io.BytesIO()
    torch.save([copy.deepcopy(part.state_dict()) for part in (model, optimizer, step)], file)
    want = run(step, optimizer, batches[4:])
    file.seek(0)
    other, optimizer, step = build(rule, 99, torch.load(file, weights_only=True), between)
    assert run(step, optimizer, batches[4:]) == want
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert step.optimizer_step == 9


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer_step": -1},
        {"optimizer_step": 1.0},
        {"auto_advance": None},
        {"classes_last": 1},
        {"selector_type": "Random"},
        {"selector": {}},
        {"selector": {"losses": torch.zeros(3)}},
        {"generator": None},
        {"generator": torch.zeros(3, dtype=torch.uint8)},
        {"generator": "seed"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(change):
    _, optimizer, step = build(selbp.LossPercentile)
    run(step, optimizer, [samples() for _ in range(3)])
    other = build(selbp.LossPercentile, seed=5)[2].state_dict()
    before = copy.deepcopy(step.state_dict())
    with pytest.raises(ValueError):
        step.load_state_dict({**other, **change})
    assert_same_state(step.state_dict(), before)
    with pytest.raises(ValueError, match="entries"):
        step.load_state_dict({})
