"""Rows that may not count: NaN samples, ignored targets, spare slots. Their weight is 0 and nothing of them leaks."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp
from selbp_study.row_models import SMALL

ALL = [
    selbp.Full(),
    selbp.Random(),
    selbp.TopLoss(),
    selbp.TopGradNorm(),
    selbp.GradNormImportance(),
    selbp.GradientMatching(),
    selbp.DivBS(),
    selbp.LossPercentile(),
    selbp.LossRank(),
]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"head_gradient": "full"}, {"backward": "rows"}, {"scoring": "eval"}],
    ids=lambda o: "-".join(o.values()),
)
def test_a_poisoned_sample_is_as_if_it_were_not_there(selector, poison, options):
    x, y = samples()
    bad = x.clone()
    bad[5] = poison
    keep = [i for i in range(24) if i != 5]
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, **options)
    got = gradients(model, step(bad, y))
    assert all(g.isfinite().all() for g in got.values())
    if isinstance(selector, (selbp.Full, selbp.Random)):
        want = gradients(model, F.cross_entropy(model(x[keep]), y[keep]))
        assert_same(got, want)
        assert step.report.loss == pytest.approx(F.cross_entropy(model(x[keep]), y[keep]).item(), rel=1e-5)
    clean = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, **options)
    if isinstance(selector, (selbp.TopLoss, selbp.TopGradNorm)):
        assert_same(got, gradients(model, clean(x[keep], y[keep])))


@pytest.mark.parametrize("loss", ["mse", "bce"])
@pytest.mark.parametrize("where", ["input", "target"])
@pytest.mark.parametrize("selector", [selbp.Full(), selbp.TopLoss(), selbp.GradientMatching()])
def test_a_poisoned_sample_of_other_losses(loss, where, selector):
    x, target = torch.randn(10, 12), torch.rand(10, 5)
    (x if where == "input" else target)[3] = float("nan")
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, loss=loss)
    got = gradients(model, step(x, target))
    assert all(g.isfinite().all() for g in got.values())
    if isinstance(selector, selbp.Full):
        keep = [i for i in range(10) if i != 3]
        function = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
        assert_same(got, gradients(model, function(model(x[keep]), target[keep])))


@pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("backward", ["recompute", "rows"])
def test_no_valid_row_gives_a_zero_gradient(selector, backward):
    x, y = samples()
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=0.25, backward=backward)
    for inputs, target in ((x, torch.full_like(y, -100)), (torch.full_like(x, float("nan")), y)):
        got = gradients(model, step(inputs, target))
        assert all((g == 0).all() for g in got.values())
        assert step.report.loss == 0.0
        step.report.as_dict()


@pytest.mark.parametrize("selector", ALL, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("backward", ["recompute", "rows"])
def test_fewer_valid_rows_than_k(selector, backward):
    x, y = samples()
    y[3:] = -100
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=0.5, backward=backward)
    got = gradients(model, step(x, y))
    assert all(g.isfinite().all() for g in got.values())
    chosen = step.report.selection
    assert set(chosen.indices[chosen.weights != 0].tolist()) <= {0, 1, 2}
    if isinstance(selector, (selbp.Full, selbp.Random)):
        assert_same(got, gradients(model, F.cross_entropy(model(x), y)))


def test_an_infinite_token_flags_its_sequence_alone():
    ids = torch.randint(0, 11, (6, 9))
    target = ids.clone()
    target[0, 2] = -100

    class Poisoned(TokenModel):
        def forward(self, input_ids):
            z = super().forward(input_ids)
            return torch.where((input_ids == 10)[:, :, None], torch.nan, z)

    ids[2, 4], ids[ids == 10] = 10, 0
    ids[2, 4] = 10
    model = Poisoned()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=1.0)
    step(ids, target)
    assert step.report._stats.valid.tolist() == [True, True, False, True, True, True]


def test_minus_infinity_on_another_class_is_a_legal_mask():
    x, y = samples()
    y = y.clamp(max=3)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            z = self.body(x)
            return torch.cat([z[:, :4], torch.full_like(z[:, 4:], -torch.inf)], 1)

    model = Masked()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=1.0)
    loss = step(x, y)
    assert torch.isfinite(loss) and step.report._stats.valid.all()
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y))


@pytest.mark.parametrize("name", ["MLP", "CNN", "ResNet-GN", "ViT"])
def test_rows_on_a_device_that_must_not_be_asked(name, monkeypatch):
    """What a GPU runs: no row is asked for, NaN in one sample or in all of them still reaches no gradient."""
    monkeypatch.setattr("selbp.training.strategies.may_ask", lambda device: False)
    task = SMALL[name]
    torch.manual_seed(0)
    model = task.build().eval()  # no dropout: the two runs below are compared
    x, y = task.batch(8)
    bad = x.clone()
    bad[5] = float("nan")
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=1.0, backward="rows")
    got = gradients(model, step(bad, y))
    kept = [0, 1, 2, 3, 4, 6, 7]
    want = gradients(model, selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=1.0)(x[kept], y[kept]))
    assert_same(got, want)
    got = gradients(model, step(torch.full_like(x, float("nan")), y))
    assert all((g == 0).all() for g in got.values())


def test_without_the_mask_an_invalid_batch_does_spoil_the_gradients():
    """The test above can fail: the same selection without ``live`` gives NaN."""
    model, (x, y) = mlp(), samples()
    losses = F.cross_entropy(model(x * float("nan")), y, reduction="none")
    chosen = torch.arange(4)
    for live in (None, torch.tensor(False)):
        got = gradients(model, torch.where(torch.zeros(4) > 0, selbp.select(losses, chosen, any_valid=live), 0).sum())
        assert all(g.isfinite().all() for g in got.values()) == (live is not None)
        losses = F.cross_entropy(model(x * float("nan")), y, reduction="none")
