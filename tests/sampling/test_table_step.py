"""The step with a table: what it writes, which batches it refuses, and the loss for wrong labels."""

import pytest
import torch
from support.sampling_kit import data, known_table, model
from torch.nn import functional as F
from torch.utils.data import DataLoader

import selbp
from selbp.sampling import NoiseAwareCrossEntropy, Proxy, ScoredBatchSampler, ScoreTable, noise_aware, rho_loss


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.2, 0.9])
def test_the_loss_is_its_formula_with_an_exact_gradient(epsilon):
    z = (3 * torch.randn(9, 4, dtype=torch.float64)).requires_grad_()
    y = torch.randint(0, 4, (9,))
    p = torch.softmax(z, 1).gather(1, y[:, None])[:, 0]
    loss = NoiseAwareCrossEntropy(epsilon)
    torch.testing.assert_close(loss(z, y), -((1 - epsilon) * p + epsilon / 4).log(), rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)


def test_a_transition_is_the_forward_correction():
    z, y = torch.randn(9, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, 4, (9,))
    transition = torch.softmax(torch.randn(4, 4, dtype=torch.float64), 1)
    loss = NoiseAwareCrossEntropy(transition)
    want = -(torch.softmax(z, 1) @ transition).gather(1, y[:, None])[:, 0].log()
    torch.testing.assert_close(loss(z, y), want, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), z)


def test_extremes_and_broken_rows_stay_with_their_sample():
    ce = torch.tensor([0.0, 200.0, torch.inf, torch.nan, 1.0], requires_grad=True)
    loss = noise_aware(ce, 0.2, 10)
    loss[[0, 1, 2, 4]].sum().backward()
    p = torch.tensor([1.0, 0.0, 0.0, 0.0, torch.e**-1])
    r = 0.8 * p / (0.8 * p + 0.02)
    torch.testing.assert_close(ce.grad[[0, 1, 2, 4]], r[[0, 1, 2, 4]], rtol=1e-5, atol=1e-30)
    assert loss[3].isnan() and torch.isfinite(loss[[0, 1, 2, 4]]).all()


def test_a_head_without_stored_logits_takes_it():
    h, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((6, 5), (4, 5), (4,)))
    y = torch.randint(0, 4, (6,))
    got = torch.autograd.grad(noise_aware(selbp.ops.linear_cross_entropy(h, w, b, y), 0.2, 4).sum(), (h, w, b))
    want = torch.autograd.grad(NoiseAwareCrossEntropy(0.2)(F.linear(h, w, b), y).sum(), (h, w, b))
    for x, z in zip(got, want, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-10, atol=1e-12)


RULES = [selbp.Full(), selbp.Random(), selbp.TopLoss(), selbp.TopGradNorm(), selbp.GradientMatching(), selbp.DivBS()]


def setting(rule, backward="auto", k=16, pool=64, weights="mean", **options):
    table, network = known_table(200, **options), model()
    table.forget(torch.arange(200))
    sampler = ScoredBatchSampler(table, k=k, pool=pool, weights=weights)
    step = selbp.SelectiveBackprop(
        network, selector=rule, keep=0.5, loss=NoiseAwareCrossEntropy(table), backward=backward, table=table
    )
    return table, network, sampler, step


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_two_levels_compose_and_scores_are_the_networks(rule, backward):
    table, network, sampler, step = setting(rule, backward)
    for x, y in DataLoader(data(), batch_sampler=sampler):
        ids = table.issued.draws[0].ids
        with torch.no_grad():
            p = torch.softmax(network(x), 1).gather(1, y[:, None])[:, 0]
        before = int((table.seen > 0).sum())
        step(x, y).backward()
        written = table.seen[ids] == table.seen.max()
        assert int(written.sum()) == (8 if rule == RULES[1] else 16)
        torch.testing.assert_close(table.probability[ids][written], p[written], rtol=1e-5, atol=1e-7)
        assert step.report.coverage * 200 == int((table.seen > 0).sum()) >= before
    assert {"headroom", "price", "noise_share", "coverage"} <= step.report.as_dict().keys()


def test_a_broken_sample_spoils_no_score():
    table, _, _, step = setting(selbp.Full())
    x, y = data()[:16]
    x = x.clone()
    x[3] = torch.nan
    step(x, y, ids=torch.arange(16)).backward()
    assert (table.seen[:16] > 0).tolist() == [i != 3 for i in range(16)]
    assert torch.isfinite(table._averages.state).all()


def test_unbiased_weights_reach_the_loss():
    table, network, sampler, step = setting(selbp.Full(), weights="unbiased")
    x, y = next(iter(DataLoader(data(), batch_sampler=sampler)))
    weights = table.issued.draws[0].weights
    want = (NoiseAwareCrossEntropy(table)(network(x), y) * weights).mean()
    torch.testing.assert_close(step(x, y), want.detach() * 1.0, check_dtype=False)


def test_what_does_not_fit_is_refused_by_name():
    table, network, sampler, step = setting(selbp.GradientMatching(), weights="unbiased")
    loader = iter(DataLoader(data(), batch_sampler=sampler))
    x, y = next(loader)
    with pytest.raises(ValueError, match="matches the mean of rows that count alike"):
        step(x, y)
    with pytest.raises(ValueError, match="the batch has 15 samples, but the next one .* has 16"):
        step(x[1:], y[1:])
    assert len(table.issued.draws) == 1  # not trained on: still the next one
    with pytest.raises(TypeError, match="table must be a selbp.sampling.ScoreTable or None"):
        selbp.SelectiveBackprop(network, selector=selbp.Full(), keep=1.0, table={})
    other = selbp.SelectiveBackprop(network, selector=selbp.Full(), keep=1.0, table=ScoreTable(200, 5))
    with pytest.raises(ValueError, match=r"logits must be \(n, C\) = \(16, 5\)"):
        other(x, y, ids=torch.arange(16))
    with pytest.raises(RuntimeError, match="which samples are these"):
        other(x, y)


def test_batches_out_of_order_are_noticed():
    table, _, sampler, step = setting(selbp.Full())
    table.fill(torch.arange(200), torch.randn(200, 4), data().tensors[1])
    batches = list(DataLoader(data(), batch_sampler=sampler))
    step(*batches[0]).backward()
    with pytest.raises(ValueError, match="sampler.skip"):
        step(*batches[2])
    sampler.skip()
    step(*batches[2]).backward()


def test_a_table_without_classes_takes_any_loss():
    table = ScoreTable(8)
    step = selbp.SelectiveBackprop(torch.nn.Linear(3, 2), selector=selbp.Full(), keep=1.0, loss="mse", table=table)
    step(torch.randn(4, 3), torch.randn(4, 2), ids=torch.arange(4)).backward()
    assert table.coverage == 0.5 and 1.0 <= table.headroom < 8


def test_the_reducible_loss_is_read_from_the_table():
    """RHO-LOSS trains on the rows of greatest loss minus the proxy's, whose numbers the sampler knows."""
    table, network = known_table(200), model()
    table.forget(torch.arange(200))
    proxy = Proxy(0.0, 0.0, 1.0, 1.0, torch.rand(200))
    sampler, arguments = rho_loss(table, proxy, k=5, pool=40)
    step = selbp.SelectiveBackprop(network, **arguments)
    for x, y in DataLoader(data(), batch_sampler=sampler):
        ids = table.issued.draws[0].ids
        with torch.no_grad():
            reducible = F.cross_entropy(network(x), y, reduction="none") - proxy.losses[ids]
        step(x, y).backward()
        assert set(step.report.selection.indices.tolist()) == set(reducible.topk(5).indices.tolist())
    with pytest.raises(ValueError, match="the table's 300 samples, got .200,"):
        rho_loss(ScoreTable(300, 4), proxy, k=5, pool=40)


class EveryFourth(selbp.BaseSelector):
    """Returns a view with strides."""

    needs = "nothing"

    def choose(self, rows, k):
        return selbp.Selection(torch.arange(rows.n)[:: rows.n // k], torch.full((k,), 1.0 / k))


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}], ids=["whole", "micro-batches"])
def test_a_rule_may_return_indices_with_strides(options):
    table, (x, y) = ScoreTable(200, 4), data().tensors
    step = selbp.SelectiveBackprop(model(), selector=EveryFourth(), keep=4, table=table, **options)
    step.backward(x[:16], y[:16], ids=torch.arange(100, 116))
    assert (table.seen > 0).nonzero()[:, 0].tolist() == [100, 104, 108, 112]
    assert table.label[[100, 104, 108, 112]].tolist() == y[[0, 4, 8, 12]].tolist()
