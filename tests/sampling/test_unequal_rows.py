"""Batches of a sampler with ``weights="unbiased"``: its factors reach every layer, in every kind of step."""

import pytest
import torch
from support.training_kit import assert_same, gradients
from torch import nn
from torch.nn import functional as F

import selbp
from selbp.common.proxies import HeadProxies
from selbp.sampling import ScoredBatchSampler, ScoreTable
from selbp.training.head_gradient import mean_of

EXACT = 1e-11


class EveryRow(selbp.Full):
    """Full, but chosen after a forward that scores."""

    needs = "statistics"


def drawn(weights="unbiased"):
    """A network, a table, and the next batch of its sampler: inputs, target and the factors."""
    torch.manual_seed(0)
    x, y = torch.randn(200, 6).double(), torch.randint(0, 4, (200,))
    table = ScoreTable(200, 4)
    table.fill(torch.arange(200), 2 * torch.randn(200, 4), y)
    ids = torch.as_tensor(next(iter(ScoredBatchSampler(table, k=16, pool=64, weights=weights))))
    network = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return network, table, x[ids], y[ids], table.issued.draws[0].weights


def expected(network, x, y, factor):
    """Each parameter's gradient of the weighted mean, and that of the plain one, which is another."""
    losses = F.cross_entropy(network(x), y, reduction="none")
    plain = gradients(network, losses.mean())
    want = gradients(network, (F.cross_entropy(network(x), y, reduction="none") * factor).mean())
    assert all((want[name] - plain[name]).norm() > 0.05 * want[name].norm() for name in want)
    return want


KINDS = {
    "unscored": {"selector": selbp.Full()},
    "outside the schedule": {"selector": selbp.TopLoss(), "schedule": selbp.Schedule(start=3)},
    "rows": {"selector": EveryRow(), "backward": "rows"},
    "recomputed": {"selector": EveryRow(), "backward": "recompute"},
    "full head, rows": {"selector": selbp.Full(), "head_gradient": "full", "backward": "rows"},
    "full head, recomputed": {"selector": selbp.Full(), "head_gradient": "full", "backward": "recompute"},
    "full head, micro-batches": {"selector": selbp.Full(), "head_gradient": "full", "micro_batch": 5},
    "full head, one process of all": {"selector": selbp.Full(), "head_gradient": "full", "scope": "global"},
    "cut": {"selector": selbp.Random(), "cut": "1"},
    "cut, recomputed": {"selector": selbp.Random(), "cut": "1", "backward": "recompute"},
    "micro-batches": {"selector": selbp.Full(), "micro_batch": 5},
    "one process of all": {"selector": EveryRow(), "scope": "global"},
}


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
def test_all_layers_get_the_weighted_mean(options):
    network, table, x, y, factor = drawn()
    want = expected(network, x, y, factor)
    network.zero_grad()
    step = selbp.SelectiveBackprop(network, keep=1.0, table=table, **options)
    step.backward(x, y)
    assert_same({name: p.grad for name, p in network.named_parameters()}, want, rtol=EXACT)


@pytest.mark.parametrize("selector", [selbp.Random(), selbp.TopGradNorm()])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_full_head_gets_it_whatever_is_chosen_for_the_layers_below(selector, backward):
    network, table, x, y, factor = drawn()
    want = expected(network, x, y, factor)
    step = selbp.SelectiveBackprop(
        network, selector=selector, keep=0.25, table=table, head_gradient="full", backward=backward
    )
    got = gradients(network, step(x, y))
    for name in ("2.weight", "2.bias"):
        assert_same({name: got[name]}, {name: want[name]}, rtol=EXACT)


@pytest.mark.parametrize("selector", [selbp.Random(), selbp.GradientMatching()])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_cut_chooses_among_the_weighted_gradients(selector, backward):
    """Above it they are whole. Below it the rows are those of a cut in a loop by hand with the weighted loss."""
    network, table, x, y, factor = drawn()
    want = expected(network, x, y, factor)
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    step = selbp.SelectiveBackprop(
        network, selector=selector, keep=0.25, table=table, cut="0", backward=backward, generator=seeds[0]
    )
    got = gradients(network, step(x, y))
    for name in ("2.weight", "2.bias"):
        assert_same({name: got[name]}, {name: want[name]}, rtol=EXACT)
    hidden = selbp.backward_cut(network[0](x), 0.25, selector, features=x, generator=seeds[1])
    losses = F.cross_entropy(network[2](network[1](hidden)), y, reduction="none")
    assert_same(got, gradients(network, (losses * factor).mean()), rtol=EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("positions", [1, 3])
def test_the_mean_is_that_of_the_gradients_times_the_factors(positions, bias):
    torch.manual_seed(0)
    residual, features = torch.randn(5, positions, 4).double(), torch.randn(5, positions, 6).double()
    factor = torch.rand(5).double()
    proxies = HeadProxies(lambda: residual, lambda: features, positions=positions, bias=bias)
    found = mean_of(proxies, factor)
    samples = torch.einsum("ntc,ntd->ncd", residual, features)
    torch.testing.assert_close(found.head_weight, (samples * factor[:, None, None]).mean(0))
    if bias:
        torch.testing.assert_close(found.head_bias, (residual.sum(1) * factor[:, None]).mean(0))
    else:
        assert found.head_bias is None
    whole = mean_of(proxies, None)
    torch.testing.assert_close(whole.head_weight, samples.mean(0))


def figures(network, x, y, factor, indices, own, k):
    """Relative residual and gain of a choice for the weighted mean, from each sample's own gradient at the head."""
    logits = network(x).detach().requires_grad_()
    F.cross_entropy(logits, y, reduction="sum").backward()
    h = torch.cat([network[:2](x).detach(), torch.ones(len(x), 1)], 1)
    g = torch.einsum("nc,nd->ncd", logits.grad, h).flatten(1) * factor[:, None]
    mean, n = g.mean(0), len(x)
    error = (mean - (own[:, None] * g[indices]).sum(0)).square().sum()
    spread = (g.square().sum() / n - mean.square().sum()) * (n - k) / (n - 1) / k  # of k drawn without repetition
    return (error / mean.square().sum()).sqrt(), spread / error


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_residual_and_gain_are_those_of_the_weighted_mean(micro_batch):
    network, table, x, y, factor = drawn()
    options = {"micro_batch": micro_batch, "backward": "recompute", "table": table, "keep": 0.25}
    step = selbp.SelectiveBackprop(network, selector=selbp.TopGradNorm(), **options)
    step.backward(x, y)
    report = step.report
    own = report.selection.weights / factor[report.selection.indices]
    residual, gain = figures(network, x, y, factor, report.selection.indices, own, 4)
    assert report.relative_residual == pytest.approx(float(residual), rel=1e-6)
    assert report.gain == pytest.approx(float(gain), rel=1e-6)


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_all_rows_have_no_residual(micro_batch):
    network, table, x, y, _ = drawn()
    step = selbp.SelectiveBackprop(
        network, selector=EveryRow(), keep=1.0, table=table, micro_batch=micro_batch, backward="recompute"
    )
    step.backward(x, y)
    assert step.report.relative_residual == pytest.approx(0, abs=1e-12)


def test_a_second_pass_of_a_full_head_is_refused():
    """The chosen rows' weights hold the factors, but those of all rows are known in the first pass only."""
    network, table, x, y, _ = drawn()
    ids = table.issued.draws[0].ids
    step = selbp.SelectiveBackprop(network, selector=selbp.Random(), keep=0.25, table=table, head_gradient="full")
    step(x, y).backward()
    with pytest.raises(ValueError, match="selection= with head_gradient='full'.*weights='unbiased'"):
        step(x, y, selection=step.report.selection)
    step(x, y, ids=ids).backward()  # that no sampler weighted
    step(x, y, selection=step.report.selection).backward()


def test_a_second_pass_of_the_chosen_rows_has_their_factors():
    network, table, x, y, factor = drawn()
    want = expected(network, x, y, factor)
    step = selbp.SelectiveBackprop(network, selector=selbp.Full(), keep=1.0, table=table)
    step(x, y)
    assert_same(gradients(network, step(x, y, selection=step.report.selection)), want, rtol=EXACT)
