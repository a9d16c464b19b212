"""Steps, cuts, rules and reports go through pickle, ``torch.save`` and ``deepcopy``, before and after a backward."""

import copy
import io
import pickle

import pytest
import torch
from support.training_kit import TokenModel, mlp, samples
from torch import nn

import selbp
from selbp.common.proxies import HeadProxies
from selbp.types import MeanGradient


def through_torch_save(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


COPIES = {"pickle": through_pickle, "torch.save": through_torch_save, "deepcopy": copy.deepcopy}
copied = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())

RULES = {
    "full": selbp.Full(),
    "random": selbp.Random(),
    "top loss": selbp.TopLoss(),
    "top gradient norm, refit": selbp.TopGradNorm(weights="refit"),
    "loss percentile": selbp.LossPercentile(history=32),
    "loss rank": selbp.LossRank(),
    "importance": selbp.GradNormImportance(threshold=1.2),
    "matching": selbp.GradientMatching(),
    "DivBS": selbp.DivBS(),
    "cube": selbp.CubeSampling(),
}


def figures(report):
    return {name: value for name, value in report.as_dict().items() if name != "seconds"}


def same(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def train(step, batch):
    step(*batch).backward()
    with torch.no_grad():
        for p in step.model.parameters():
            p.sub_(0.1 * p.grad) if p.grad is not None else None
            p.grad = None


WAYS = ["auto", "rows", "recompute", "full head", "cut", "cut recompute"]
CASES = [
    pytest.param(copied, rule, way, id=f"{how}-{name}-{way}")
    for name, rule in RULES.items()
    for way in WAYS
    for how, copied in COPIES.items()
    if not (way.startswith("cut") and rule.needs == "loss") and (how == "pickle" or name == "matching")
]


@pytest.mark.parametrize(("copied", "rule", "backward"), CASES)
def test_a_copied_step_goes_on_as_the_step_does(copied, rule, backward):
    options = {"backward": backward}
    if backward.startswith("cut"):
        options = {"cut": "0", "backward": "recompute" if "recompute" in backward else "auto"}
    elif backward == "full head":
        options = {"head_gradient": "full", "backward": "rows"}
    step = selbp.SelectiveBackprop(
        mlp(),
        selector=copy.deepcopy(rule),
        keep=0.25,
        generator=torch.Generator().manual_seed(3),
        schedule=selbp.Schedule(end=9),
        class_weight=torch.rand(5) + 0.5,
        **options,
    )
    first = copied(step)  # before anything has run
    for _ in range(2):
        batch = samples()
        train(step, batch)
        train(first, batch)
    other = copied(step)
    assert same(step.model, other.model) and same(step.model, first.model)
    assert figures(other.report) == figures(step.report) and other.report.seconds == step.report.seconds
    batch = samples()
    train(step, batch)
    train(other, batch)
    assert same(step.model, other.model)
    assert torch.equal(step.report.selection.indices, other.report.selection.indices)


@copied
@pytest.mark.parametrize("proxy", ["pooled", "flat", "positions"])
def test_a_copied_model_with_a_cut_goes_on_as_the_model_does(copied, proxy):
    torch.manual_seed(1)
    cut = selbp.BackwardCut(3, generator=torch.Generator().manual_seed(3), proxy=proxy)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), cut, nn.Flatten(), nn.Linear(24, 5))
    x, y = torch.randn(12, 2, 8), torch.randint(0, 5, (12,))
    first = copied(model)
    for each in (model, first):
        nn.functional.cross_entropy(each(x), y).backward()
    other = copied(model)
    report, copy_ = cut.report, other[2].report
    assert (copy_.k, copy_.relative_residual, copy_.gain) == (3, report.relative_residual, report.gain)
    assert report.relative_residual > 0 and report.gain > 0
    model.zero_grad(), other.zero_grad()
    for each in (model, other):
        nn.functional.cross_entropy(each(2 * x), y).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@copied
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce", "causal_lm"])
def test_every_loss(copied, loss):
    model = TokenModel() if loss == "causal_lm" else mlp()
    x, y = samples(8)
    if loss == "causal_lm":
        x = y = torch.randint(0, 11, (8, 6))
    elif loss != "cross_entropy":
        y = torch.rand(8, 5)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.5, loss=loss)
    step(x, y).backward()
    other = copied(step)
    assert other.report.loss == step.report.loss
    assert other(x, y) == step(x, y)


@copied
def test_a_cut_step_before_its_backward(copied):
    step = selbp.SelectiveBackprop(mlp(), cut="0", selector=selbp.GradientMatching(), keep=0.25)
    step(*samples())
    report = copied(step.report)
    assert report.loss == step.report.loss and report.cut is None
    with pytest.raises(RuntimeError, match="has not run yet"):
        report.weight_sum  # noqa: B018


@copied
@pytest.mark.parametrize("positions", [1, 3])
def test_proxies_and_plain_tuples(copied, positions):
    residual, features = torch.randn(6, positions, 4), torch.randn(6, positions, 5)
    proxies = HeadProxies(lambda: residual, lambda: features, positions=positions)
    other = copied(proxies)
    torch.testing.assert_close(other.gram(), proxies.gram(), rtol=0, atol=0)
    torch.testing.assert_close(other.residual, residual.sum(1), rtol=0, atol=0)
    proxies.mean_gradient()
    proxies.release()
    assert torch.equal(copied(proxies).gram(), proxies.gram())
    with pytest.raises(RuntimeError, match="have been released"):
        copied(proxies).residual  # noqa: B018
    plain = selbp.GradientProxies(lambda: residual[:, 0], lambda: features[:, 0])
    assert torch.equal(copied(plain).gram(), plain.gram())
    for thing in (
        selbp.Schedule(1, 9, 2),
        selbp.Selection(torch.arange(2), torch.ones(2)),
        MeanGradient(*residual[:4]),
    ):
        assert type(copied(thing)) is type(thing)
