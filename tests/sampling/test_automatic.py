"""Everything in one call trains as the parts on their own do, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import selbp
from selbp.sampling import ScoredBatchSampler, ScoreTable, fit_proxy


def data_and_model():
    torch.manual_seed(0)
    x, y = torch.randn(600, 8), torch.randint(0, 3, (600,))
    return TensorDataset(x + 2 * nn.functional.one_hot(y, 8), y), nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def parts(model, data):
    """The same by hand."""
    table = ScoreTable(len(data), 3)
    fit_proxy(data, table, seed=5)
    loss = selbp.NoiseAwareCrossEntropy(table)
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss=loss, table=table)
    return selbp.AutoSelect(step, ScoredBatchSampler(table, 16, 64, seed=5))


def test_its_batches_and_gradients_are_those_of_the_parts():
    """For as long as the controller tries what a random step costs; later it goes by the clock."""
    data, model = data_and_model()
    seen = []
    for auto in (selbp.auto_select(model, data, classes=3, k=16, pool=64, seed=5), parts(model, data)):
        model.zero_grad()
        batches = []
        for (inputs, target), _ in zip(DataLoader(data, batch_sampler=auto.sampler), range(5), strict=False):
            auto(inputs, target).backward()
            batches.append(inputs)
        seen.append([*batches, *(p.grad.clone() for p in model.parameters())])
    assert len(seen[0]) == 9 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


class Named(nn.Module):
    """A model that takes its input by name and gives its logits by name, as Transformers' do."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.body(pixel_values)}


@pytest.mark.parametrize("key", ["labels", "label"])
def test_a_data_set_of_dicts_trains_as_one_of_pairs(key: str) -> None:
    data, model = data_and_model()
    named = [{"pixel_values": x, key: int(y)} for x, y in data]
    seen = []
    for dataset, net, options in ((data, model, {}), (named, Named(model), {"target_keys": (key,)})):
        auto = selbp.auto_select(net, dataset, classes=3, k=16, pool=64, seed=5, **options)
        model.zero_grad()
        for batch, _ in zip(DataLoader(dataset, batch_sampler=auto.sampler), range(5), strict=False):
            (auto(batch) if isinstance(batch, dict) else auto(*batch)).backward()
        seen.append([auto.sampler.table.probability, *(p.grad.clone() for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_the_price_of_the_proxy_is_a_share_of_the_training():
    data, model = data_and_model()
    never = selbp.auto_select(model, data, classes=3, k=16, pool=64, steps=100, step_seconds=0.0)
    assert bool(never.sampler.table.probability.isnan().all())
    always = selbp.auto_select(model, data, classes=3, k=16, pool=64, steps=100, step_seconds=1e6)
    assert not bool(always.sampler.table.probability.isnan().any())
    with pytest.raises(ValueError, match="step_seconds needs steps"):
        selbp.auto_select(model, data, classes=3, step_seconds=1.0)


def test_targets_that_are_no_classes():
    data = TensorDataset(torch.randn(100, 4), torch.randn(100, 1))
    auto = selbp.auto_select(nn.Linear(4, 1), data, k=8, pool=16, loss="mse")
    inputs, target = next(iter(DataLoader(data, batch_sampler=auto.sampler)))
    auto(inputs, target).backward()
    assert auto.report.k == 8 and auto.sampler.table.classes is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"k": 0}, "k must be"), ({"pool": 4}, "pool must be at least k"), ({"noise": "loud"}, "noise must be one of")],
    ids=["k", "pool", "noise"],
)
def test_wrong_arguments_are_named(wrong, said):
    data, model = data_and_model()
    with pytest.raises(ValueError, match=said):
        selbp.auto_select(model, data, classes=3, **wrong)
    with pytest.raises(TypeError, match="dataset must be map-style"):
        selbp.auto_select(model, iter(data), classes=3)


def known_prices(**changes):
    data, model = data_and_model()
    table = ScoreTable(len(data), 3)
    fit_proxy(data, table, seed=5)
    step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, table=table)
    prices = {"random": 1.0, "drawn": 1.0} | changes
    return selbp.AutoSelect(step, ScoredBatchSampler(table, 16, 64, seed=5), prices=prices, every=5), data


@pytest.mark.parametrize(("price", "chosen"), [(0.5, "drawn"), (100.0, "random")])
def test_known_prices_decide_without_a_clock(monkeypatch, price, chosen):
    monkeypatch.setattr("selbp.sampling.auto.time", None)
    auto, data = known_prices(drawn=price)
    for _ in range(3):
        for inputs, target in DataLoader(data, batch_sampler=auto.sampler):
            auto(inputs, target).backward()
    assert auto.current == chosen and auto.prices == {"random": 1.0, "drawn": price}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"other": 1.0}, "prices must name the candidates"),
        ({"drawn": 0.0}, "prices must be above 0"),
        ({"drawn": -1.0}, "the price of drawn must be"),
    ],
    ids=["name", "zero", "negative"],
)
def test_wrong_prices_are_named(change, error):
    with pytest.raises(ValueError, match=error):
        known_prices(**change)


def test_a_second_pass_on_given_rows_takes_no_batch_of_the_sampler():
    data, model = data_and_model()
    auto = selbp.auto_select(model, data, classes=3, k=16, pool=64)
    step = auto.candidates["drawn"].step
    loader = iter(DataLoader(data, batch_sampler=auto.sampler))
    for _ in range(3):
        inputs, target = next(loader)
        step(inputs, target).backward()
        seen = auto.sampler.table.state_dict()
        step(inputs, target, selection=step.report.selection).backward()
        again = auto.sampler.table.state_dict()
        assert all(torch.equal(seen[name], again[name]) for name in seen if isinstance(seen[name], torch.Tensor))


def test_micro_batches_train_as_the_whole_batch():
    seen = []
    for options in ({}, {"micro_batch": 5}):
        data, model = data_and_model()
        auto = selbp.auto_select(model, data, classes=3, k=16, pool=64, seed=5, **options)
        for (inputs, target), _ in zip(DataLoader(data, batch_sampler=auto.sampler), range(3), strict=False):
            loss = auto.backward(inputs, target, scale=0.5)
        assert not loss.requires_grad and float(loss) == pytest.approx(auto.report.loss)
        seen.append([p.grad for p in model.parameters()])
    for part, whole in zip(*seen, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)  # sums of 48 rows in another order
