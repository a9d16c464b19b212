"""On rows the loss that trains is formed of the chosen rows' logits; no step copies or stores those of all rows."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import selbp
from selbp.training import sketched

VIEWS = {"view", "_unsafe_view", "detach", "alias", "slice", "select", "transpose", "t", "unsqueeze", "expand"}


class Made(TorchDispatchMode):
    """Names and numbers of entries of what operators that are no views gave."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if isinstance(result, torch.Tensor) and name not in VIEWS:
            self.found.append((name, result.numel()))
        return result


def sequences(n=16, length=9):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 11, (n, length), generator=generator)
    labels = ids.clone()
    labels[::3, 4:6] = -100
    return ids, labels


def token_step(model, backward="rows", **options):
    options = {"selector": selbp.GradientMatching(), "proxy": "sketch", "keep": 0.25, **options}
    return selbp.SelectiveBackprop(model, loss="causal_lm", backward=backward, **options)


@pytest.mark.parametrize("rule", [selbp.TopLoss(), selbp.GradientMatching()], ids=["loss", "gradients"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_logits_of_all_rows_are_made_once(rule, backward, monkeypatch):
    monkeypatch.setattr(sketched, "TILE_BYTES", {"cpu": 0, "cuda": 0})
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 600, bias=False))
    ids, labels = sequences(n=64)
    step = token_step(model, backward, selector=rule)
    step(ids, labels)
    with Made() as made:
        step(ids, labels)
    logits = 64 * 9 * 600
    assert [name for name, entries in made.found if entries >= logits * 8 // 9] == ["mm"]  # the head
    assert [entries for name, entries in made.found if name == "_log_softmax"] == [logits // 4]


@pytest.mark.parametrize("rule", [selbp.TopLoss(), selbp.GradientMatching()], ids=["loss", "gradients"])
def test_one_label_a_sample(rule):
    model, (x, y) = mlp(), samples()
    step = selbp.SelectiveBackprop(model, selector=rule, keep=0.25, backward="rows")
    with Made() as made:
        step(x, y)
    assert [entries for name, entries in made.found if name == "_log_softmax"] == [len(x) // 4 * 5]


@pytest.mark.parametrize("tile", [0, 11 * 8 * 70, 1 << 20], ids=["least", "some", "all at once"])
def test_sketches_of_tiles_are_those_of_all_positions(tile, monkeypatch):
    monkeypatch.setattr(sketched, "LEAST", 5)
    monkeypatch.setattr(sketched, "TILE_BYTES", {"cpu": tile, "cuda": tile})
    seen = []

    class Spy(selbp.GradientMatching):
        def select(self, stats, k, *, proxies=None, extras=None, generator=None):
            seen.append(proxies.gram())
            return super().select(stats, k, proxies=proxies, extras=extras, generator=generator)

    torch.manual_seed(0)
    model, (ids, labels) = TokenModel().double(), sequences()
    token_step(model, selector=Spy())(ids, labels)
    monkeypatch.setattr(sketched, "LEAST", 1 << 20)
    token_step(model, selector=Spy())(ids, labels)
    torch.testing.assert_close(*seen, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["plain", "smoothed"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_the_position_that_predicts_nothing_counts_for_nothing(backward, smoothing):
    """Whatever its logits are."""

    class Odd(TokenModel):
        def forward(self, ids):
            z = super().forward(ids)
            last = torch.arange(ids.shape[1])[None, :, None] == ids.shape[1] - 1
            return torch.where(last, torch.nan, z)

    torch.manual_seed(0)
    model, (ids, labels) = Odd().double(), sequences()
    options = {"class_weight": torch.arange(1, 12) / 7, "label_smoothing": smoothing}
    step = token_step(model, backward, selector=selbp.Full(), proxy="exact", **options)
    got = step(ids, labels)
    assert step.report._stats.valid.all() and torch.isfinite(got)
    torch.manual_seed(0)
    plain = TokenModel().double()
    weight = options["class_weight"].double()
    z, y = plain(ids)[:, :-1].transpose(1, 2), labels[:, 1:]
    entries = F.cross_entropy(z, y, weight, reduction="none", label_smoothing=smoothing)
    want = entries.sum() / weight[y.clamp(min=0)][y != -100].sum()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert_same(gradients(model, got), gradients(plain, want), 1e-10)


@pytest.mark.parametrize(
    "rule, proxy",
    [(selbp.TopLoss(), "exact"), (selbp.GradientMatching(), "exact"), (selbp.GradientMatching(), "sketch")],
    ids=["loss", "gradients", "sketches"],
)
@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("position", [8, 3], ids=["last", "label ignored"])
@pytest.mark.parametrize("spoilt", ["features", "logits"])
def test_what_is_not_finite_where_nothing_is_predicted(spoilt, position, backward, rule, proxy):
    """A sample whose gradient is not finite is not chosen; the last position's logits are no part of the gradient."""
    torch.manual_seed(0)
    model, (ids, labels) = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)).double(), sequences()
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight[:, 0] = 0
        model[0].weight[10, 0] = torch.nan if spoilt == "features" else 1e150
        model[1].weight[3, 0] = 1e160
    ids.clamp_(max=9)[2, position] = 10
    labels[2, position + 1 :] = -100
    trains = spoilt == "logits" and position == 8
    step = token_step(model, backward, selector=rule, proxy=proxy, keep=1.0)
    got = gradients(model, step(ids, labels))
    valid = [row for row in range(16) if row != 2 or trains]
    assert step.report._stats.valid.nonzero().flatten().tolist() == valid
    indices, weights = step.report.selection
    trained = set(indices[weights != 0].tolist())
    assert trained and trained <= set(valid) and (rule.needs == "gradients" or len(trained) == len(valid))
    entries = F.cross_entropy(model(ids[indices])[:, :-1].mT, labels[indices, 1:], reduction="none").sum(1)
    want = 16 / (labels[valid, 1:] != -100).sum() * (entries * weights).sum()
    assert_same(got, gradients(model, want), 1e-10)


@pytest.mark.parametrize("length", [2, 9])
def test_a_rule_sees_the_positions_that_predict(length):
    seen = []

    class Spy(selbp.GradientMatching):
        def select(self, stats, k, *, proxies=None, extras=None, generator=None):
            seen.append((proxies.positions, proxies.features, proxies.gram()))
            return super().select(stats, k, proxies=proxies, extras=extras, generator=generator)

    torch.manual_seed(0)
    model, (ids, labels) = TokenModel().double(), sequences(length=length)
    token_step(model, selector=Spy(), proxy="exact")(ids, labels)
    positions, features, gram = seen[0]
    assert positions == length - 1
    torch.testing.assert_close(features, model.mix(model.embed(ids))[0][:, :-1].mean(1))
    if length == 2:  # samples with one position each are compared exactly
        token_step(model, selector=Spy(), proxy="sketch")(ids, labels)
        torch.testing.assert_close(seen[1][2], gram)


@pytest.mark.parametrize("shape", [(-1, 5), (8, -1, 5), (1, -1, 5)], ids=["positions first", "pairs", "one sample"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_logits_of_another_number_of_samples_are_refused(backward, shape):
    model = nn.Sequential(nn.Linear(12, 5), nn.Flatten(0, -2), nn.Unflatten(0, shape[:-1]))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, backward=backward)
    with pytest.raises(ValueError, match="logits must have n = 16 rows of classes, got"):
        step(torch.randn(16, 3, 12), torch.zeros(16, 3, dtype=torch.int64))
