"""What choosing costs while it is off, in work and not by the clock; and that no noise is found where there is none."""

import math

import pytest
import torch
from support.sampling_kit import data
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

import selbp
from selbp.sampling import AutoSelect, NoiseAwareCrossEntropy, ScoredBatchSampler, ScoreTable, fit_proxy
from selbp.sampling import auto as controller
from selbp.sampling.record import lower_bound

STEPS, ROWS = 64, 16


class Calls(TorchDispatchMode):
    """Counts what runs in torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of_steps(monkeypatch, kind):
    """Torch calls of STEPS steps: of plain random rows, or of a controller that does not choose."""
    samples = data(2000, features=8, classes=3)
    x, y = samples.tensors
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    table = ScoreTable(2000, 3)
    table.fill(torch.arange(2000), torch.zeros(2000, 3), y)
    table.measure()
    if kind == "written each step":
        monkeypatch.setattr(controller, "SPARSE", 1)
    options = {} if kind == "plain" else {"table": table, "loss": NoiseAwareCrossEntropy(table)}
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, **options)
    sampler = ScoredBatchSampler(table, ROWS, 30)
    if kind != "plain":
        step = AutoSelect(step, sampler, prices={"random": 1.0, "drawn": 100.0})
    batches = iter(sampler)
    with Calls() as calls:
        for number in range(STEPS):
            ids = list(range(number, number + ROWS)) if kind == "plain" else next(batches)
            step(x[ids], y[ids]).backward()
    return calls.count


def test_a_step_that_does_not_choose_makes_hardly_a_call_more_than_a_plain_one(monkeypatch):
    """At most two more of some hundred: the slice of the order, and every eighth step the write of its scores."""
    plain = calls_of_steps(monkeypatch, "plain")
    off = calls_of_steps(monkeypatch, "off")
    assert off - plain <= 2 * STEPS, f"{(off - plain) / STEPS:.2f} calls a step more than {plain / STEPS:.0f}"
    assert calls_of_steps(monkeypatch, "written each step") > off  # the count sees a write


def test_a_random_step_writes_one_time_in_eight_and_a_drawn_one_each_time():
    table = ScoreTable(400, 3)
    sampler = ScoredBatchSampler(table, 8, 16)
    for record_every, wanted in ((8, 3), (1, 25)):
        sampler.use(scored=record_every == 1, record_every=record_every)
        list(sampler)
        assert sum(d.recorded for d in table.issued.draws) in (wanted, wanted + 1)


def test_batches_of_a_controller_that_is_off_are_a_shuffled_pass_after_another():
    table = ScoreTable(1003, 3)
    sampler = ScoredBatchSampler(table, 8, 20, weights="unbiased")
    sampler.use(scored=False)
    batches = [batch for _ in range(5) for batch in sampler]  # 5 epochs of 50: two passes of 125
    assert all(d.uniform == 8 and (d.weights == 1).all() for d in table.issued.draws)
    for sweep in (batches[:125], batches[125:]):
        assert len({i for batch in sweep for i in batch}) == 1000
    assert batches[:125] != batches[125:] and batches[0] != sorted(batches[0])


# ------------------------------------------------------------------------------------------------------ noise


def planted(share, n=6000, seed=0):
    samples = data(n, features=8, classes=4)
    y = samples.tensors[1]
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(n, generator=generator) < share
    other = (y + torch.randint(1, 4, (n,), generator=generator)) % 4
    table = ScoreTable(n, 4)
    fit_proxy(TensorDataset(samples.tensors[0], torch.where(wrong, other, y)), table, passes=8, seed=seed)
    return table


@pytest.mark.parametrize(("share", "shown"), [(0.0, False), (0.2, True)], ids=["clean", "a fifth wrong"])
def test_the_loss_is_the_plain_one_until_noise_is_shown(share, shown):
    table = planted(share)
    logits, y = torch.randn(16, 4), torch.randint(0, 4, (16,))
    plain = nn.functional.cross_entropy(logits, y, reduction="none")
    assert (table.shown_epsilon > 0) == shown
    assert torch.equal(NoiseAwareCrossEntropy(table)(logits, y), plain) != shown


def test_the_first_guess_of_a_table_shows_nothing():
    """Without a proxy eps begins at .1; as rows come in that are all believed, it falls, and is never shown."""
    table = ScoreTable(4000, 4, window=512)
    assert table.shown_epsilon == 0.0
    for start in range(0, 4000, 50):
        ids = torch.arange(start, start + 50)
        y = ids % 4
        table.record(table.next(50, ids), y, logits=9.0 * nn.functional.one_hot(y, 4).float())
        assert table.shown_epsilon == 0.0
    other = ScoreTable(4000, 4, window=512)
    other.load_state_dict(table.state_dict())
    assert other._prior == table._prior < 1e-3


@pytest.mark.parametrize("window", [48, 1024])
@pytest.mark.parametrize("how", ["some rows", "rows not live", "rows not numbers", "rows chosen freely"])
def test_the_first_guess_fades_by_the_rows_that_are_recorded(how, window):
    """As it does where no others were drawn: eps and its bound are then the same."""
    one, other = ScoreTable(4000, 10, window=window), ScoreTable(4000, 10, window=window)
    for start in range(0, 4000, 128):
        ids = torch.arange(start, min(start + 128, 4000))
        y = ids % 10
        logits = math.log(0.15 / (0.85 / 9)) * nn.functional.one_hot(y, 10).float()  # p = .15 of each label
        live = (torch.arange(len(ids)) % 4 == 1) & (ids < 3900)  # of the last 100, none
        place = live.nonzero()[:, 0]
        one.record(one.next(len(place), ids[place]), y[place], logits=logits[place])
        draw = other.next(len(ids), ids)
        if how == "some rows":
            other.record(draw, y[place], logits=logits[place], place=place)
        elif how == "rows not live":
            other.record(draw, y, logits=logits, live=live)
        elif how == "rows not numbers":
            other.record(draw, y, logits=torch.where(live[:, None], logits, torch.nan))
        else:  # by a score: places from ``uniform`` on
            order = torch.cat([place, (~live).nonzero()[:, 0]])
            draw = draw._replace(ids=ids[order], uniform=len(place))
            other.record(draw, y[order], logits=logits[order])
        assert other._prior == one._prior
        assert other.shown_epsilon == one.shown_epsilon == 0.0
    assert one._prior < 1.0


def test_the_level_of_the_bound_holds():
    """Of a true share just at the limit, at most one sample in a hundred shows more: 2000 draws, 4.5 deviations."""
    generator = torch.Generator().manual_seed(3)
    for share, rows in ((0.05, 1024), (0.02, 300)):
        found = (torch.rand(2000, rows, generator=generator) < share).double().mean(1)
        above = sum(lower_bound(float(value), rows) > share for value in found)
        assert above <= 20 + 4.5 * 20**0.5
        assert lower_bound(4 * share, rows) > share
    assert lower_bound(0.3, 0.0) == 0.0
