"""What each rule chooses, and with which weights."""

import numpy as np
import pytest
import scipy.optimize
import torch
from support.selection_cases import Batch

import selbp
from selbp import ops
from selbp.reference.choices import percentile_odds

F64 = torch.float64


def residual_of(batch, found):
    return float((batch.mean - found.weights @ batch.gradients[found.indices]).norm() / batch.mean.norm())


@pytest.mark.parametrize(
    "selector, score",
    [
        (selbp.TopLoss(), lambda b: b.loss),
        (selbp.TopGradNorm(), lambda b: b.gradients.norm(dim=1)),
        (selbp.ReducibleLoss(), lambda b: b.loss - b.irreducible),
    ],
    ids=["loss", "gradient norm", "reducible loss"],
)
def test_top(selector, score, batch):
    found = batch.select(selector, 10)
    assert torch.equal(found.indices, score(batch).topk(10).indices)
    torch.testing.assert_close(found.weights, torch.full((10,), 0.1, dtype=F64))
    found = batch.select(type(selector)(weights="batch"), 10)
    torch.testing.assert_close(found.weights, torch.full((10,), 1 / 64, dtype=F64))


@pytest.mark.parametrize("selector", [selbp.TopLoss, selbp.TopGradNorm, selbp.ReducibleLoss])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_refit_is_nonnegative_least_squares(selector, ridge, batch):
    found = batch.select(selector(weights="refit", ridge=ridge), 12)
    g = batch.gradients[found.indices]
    lam = ridge * batch.gradients.square().sum(1).mean()
    tall = torch.cat([g.T, lam.sqrt() * torch.eye(12, dtype=F64)]).numpy()
    exact = scipy.optimize.nnls(tall, torch.cat([batch.mean, g.new_zeros(12)]).numpy())[0]
    np.testing.assert_allclose(found.weights.numpy(), exact, atol=1e-10)
    assert residual_of(batch, found) < residual_of(batch, batch.select(selector(), 12))


def test_matching_is_the_operator(batch):
    proxies, mean = batch.proxies, batch.proxies.mean_gradient()
    for options in ({}, {"rule": "raw", "ridge": 0.1}, {"rule": "normalized", "nonnegative": False}):
        found = batch.select(selbp.GradientMatching(**options), 16)
        expected = ops.match(proxies.gram(), mean.inner, mean.target_sq, 16, **options)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.weights, expected.weights)
        assert residual_of(batch, found) == pytest.approx(float(expected.residual), rel=1e-6)
    for mode, weight in (("mean", 1 / 16), ("batch", 1 / 64)):
        equal = batch.select(selbp.GradientMatching(weights=mode), 16)
        torch.testing.assert_close(equal.weights, torch.full((16,), weight, dtype=F64))


def test_matching_beats_the_others(batch):
    matched = residual_of(batch, batch.select(selbp.GradientMatching(), 16))
    refit = residual_of(batch, batch.select(selbp.TopGradNorm(weights="refit"), 16))
    random = np.median([residual_of(batch, batch.select(selbp.Random(), 16)) for _ in range(20)])
    assert matched <= 1.02 * refit < 0.7 * random


def test_unit_sum_is_solved_jointly(batch):
    """Exactly the minimiser of the penalised objective on the chosen rows, and a sum near 1 as the penalty grows."""
    free = batch.select(selbp.GradientMatching(), 16)
    mean_sq = batch.gradients.square().sum(1).mean()
    last = float(free.weights.sum())
    for unit_sum in (0.1, 1.0, 100.0):
        found = batch.select(selbp.GradientMatching(unit_sum=unit_sum), 16)
        total = float(found.weights.sum())
        assert last < total < 1.01
        last = total
        root = (unit_sum * mean_sq).sqrt()
        tall = torch.cat(
            [batch.gradients[found.indices].T, root.expand(1, 16), (1e-3 * mean_sq).sqrt() * torch.eye(16)]
        )
        target = torch.cat([batch.mean, root[None], torch.zeros(16)])
        exact = scipy.optimize.nnls(tall.numpy(), target.numpy())[0]
        np.testing.assert_allclose(found.weights.numpy(), exact, atol=1e-8)
    assert last == pytest.approx(1.0, abs=1e-2)
    # dividing the free weights by their sum has the same sum and a worse match
    scaled = free._replace(weights=free.weights / free.weights.sum())
    assert residual_of(batch, found) < residual_of(batch, scaled)


def test_unit_sum_with_rows_that_are_not_valid():
    batch = Batch(n=40, valid=torch.arange(40) % 2 == 0)
    found = batch.select(selbp.GradientMatching(unit_sum=100.0), 12)
    assert float(found.weights.sum()) == pytest.approx(0.5, abs=1e-2)  # of what all valid rows weigh


def test_percentile_history():
    """Odds against brute force over a stream: a deque of the last valid losses, the batch's own included."""
    rule = selbp.LossPercentile(beta=2.0, p_min=0.05, history=50)
    seen = []
    for step in range(8):
        batch = Batch(n=16, seed=step, valid=torch.rand(16) > 0.2)
        seen = (seen + batch.loss[batch.valid].tolist())[-50:]
        odds, _ = percentile_odds(batch.loss, batch.valid, rule.state_dict()["losses"], 2.0, 0.05)
        batch.select(rule, 8)
        expected = [max(0.05, (sum(h < x for h in seen) / len(seen)) ** 2) for x in batch.loss[batch.valid].tolist()]
        torch.testing.assert_close(odds[batch.valid], torch.tensor(expected, dtype=F64))
        kept = rule.state_dict()["losses"]
        assert kept[~kept.isnan()].tolist() == seen and kept.shape == (50,)


def test_percentile_history_shorter_than_a_batch(batch):
    rule = selbp.LossPercentile(history=10)
    for _ in range(3):
        found = batch.select(rule, 16)
        assert found.indices.unique().numel() <= 16 and (found.weights > 0).any()
    assert torch.equal(rule.state_dict()["losses"], batch.loss[-10:])


def test_percentile_prefers_high_losses(batch):
    rule = selbp.LossPercentile(beta=20.0)
    kept = torch.cat([batch.select(rule, 8).indices for _ in range(50)])
    assert batch.loss[kept].mean() > batch.loss.topk(16).values.mean()


def test_importance_switch_follows_the_running_mean(batch):
    odds = batch.residual.norm(dim=1)
    odds = odds / odds.sum()
    tau = float((1 - (odds - 1 / 64).square().sum() / odds.square().sum()).rsqrt())
    rule = selbp.GradNormImportance(threshold=tau * (1 - 0.9**3) - 1e-6)  # passed at the third batch
    for step in range(1, 5):
        found = batch.select(rule, 16)
        assert float(rule.tau) == pytest.approx(tau * (1 - 0.9**step))
        uniform = torch.allclose(found.weights, torch.full((16,), 1 / 16, dtype=F64))
        assert uniform == (step < 3)


@pytest.mark.parametrize("backward, cost", [("recompute", 1 + 3 / 4), ("rows", 1 + 2 / 4)])
def test_importance_break_even(backward, cost, batch):
    for factor, by_norm in ((0.99, False), (1.01, True)):
        rule = selbp.GradNormImportance(threshold=backward, momentum=1.0)
        rule.load_state_dict({"tau": torch.tensor(cost / (3 / 4) * factor, dtype=F64)})
        weights = batch.select(rule, 16).weights
        assert bool((weights != weights[0]).any()) == by_norm


def test_importance_weights(batch):
    found = batch.select(selbp.GradNormImportance(replacement=True), 16)
    odds = batch.residual.norm(dim=1) / batch.residual.norm(dim=1).sum()
    torch.testing.assert_close(found.weights, 1 / (64 * 16 * odds[found.indices]))
    found = batch.select(selbp.GradNormImportance(norm="gradient", weights="batch"), 16)
    torch.testing.assert_close(found.weights, torch.full((16,), 1 / 64, dtype=F64))


def test_divbs_spans_what_it_can(batch):
    found = batch.select(selbp.DivBS(), 30)
    assert found.indices.unique().numel() == 30
    torch.testing.assert_close(found.weights, torch.full((30,), 1 / 30, dtype=F64))
    for seed in range(5):  # rank 3 of 12: independent rows come first
        narrow = Batch(n=12, classes=1, d=2, seed=seed)
        assert torch.linalg.matrix_rank(narrow.gradients[narrow.select(selbp.DivBS(), 3).indices]) == 3


def test_a_rule_states_its_needs_and_itself():
    assert selbp.TopLoss().needs == "loss" and selbp.TopLoss(weights="refit").needs == "gradients"
    assert selbp.TopGradNorm().needs == "statistics" and selbp.Random().needs == "nothing"
    assert selbp.GradientMatching().needs == selbp.DivBS().needs == "gradients"
    assert repr(selbp.TopLoss(weights="batch")) == "TopLoss(weights='batch', ridge=0.001)"


def test_only_what_is_needed_is_computed(rule, batch):
    """A rule that does not ask for gradients runs without proxies, one that needs nothing on unscored statistics."""
    if rule.needs == "gradients":
        with pytest.raises(ValueError, match="proxies must be given"):
            rule.select(batch.stats, 4, extras=batch.extras)
        return
    stats = batch.stats
    if rule.needs == "nothing":
        stats = selbp.BatchStatistics.unscored(batch.valid)
    elif rule.needs == "loss":
        stats = stats._replace(residual_sq=torch.full_like(stats.loss, torch.nan), lse=stats.loss * torch.nan)
    found = rule.select(stats, 4, extras=batch.extras)
    assert torch.isfinite(found.weights).all() and (found.weights > 0).any()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: selbp.TopLoss(weights="unbiased"), "weights must be one of"),
        (lambda: selbp.TopGradNorm(ridge=-1.0), "ridge must be"),
        (lambda: selbp.TopGradNorm(ridge=float("nan")), "ridge must be"),
        (lambda: selbp.LossPercentile(beta=-1.0), "beta must be"),
        (lambda: selbp.LossPercentile(p_min=1.5), "p_min must be"),
        (lambda: selbp.LossPercentile(history=0), "history must be"),
        (lambda: selbp.LossPercentile(weights="refit"), "weights must be one of"),
        (lambda: selbp.LossPercentile(weights="unbiased"), "p_min must be > 0"),
        (lambda: selbp.LossRank(weights="refit"), "weights must be one of"),
        (lambda: selbp.GradNormImportance(norm="loss"), "norm must be one of"),
        (lambda: selbp.GradNormImportance(weights="refit"), "weights must be one of"),
        (lambda: selbp.GradNormImportance(threshold="auto"), "threshold must be one of"),
        (lambda: selbp.GradNormImportance(threshold=-1.0), "threshold must be"),
        (lambda: selbp.GradNormImportance(momentum=1.5), "momentum must be"),
        (lambda: selbp.GradientMatching(rule="omp"), "rule must be one of"),
        (lambda: selbp.GradientMatching(ridge=float("inf")), "ridge must be"),
        (lambda: selbp.GradientMatching(weights="unbiased"), "weights must be one of"),
        (lambda: selbp.GradientMatching(unit_sum=-1.0), "unit_sum must be"),
        (lambda: selbp.DivBS(weights="refit"), "weights must be one of"),
        (lambda: selbp.ReducibleLoss(weights="unbiased"), "weights must be one of"),
    ],
)
def test_bad_options_are_refused_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_options_of_a_wrong_type():
    for build in (
        lambda: selbp.TopLoss(ridge="much"),
        lambda: selbp.TopLoss(ridge=True),
        lambda: selbp.ReducibleLoss(irreducible=3),
    ):
        with pytest.raises(TypeError):
            build()


def test_bad_calls(rule, batch):
    for k in (0, -1, 65):
        with pytest.raises(ValueError, match="k must lie"):
            batch.select(rule, k)
    for k in (True, 4.0, "4", float("nan")):
        with pytest.raises(TypeError, match="k must be an int"):
            batch.select(rule, k)


def test_reducible_loss_needs_its_tensor(batch):
    rule = selbp.ReducibleLoss(irreducible="holdout")
    with pytest.raises(ValueError, match="extras must hold 'holdout'.*got 'irreducible_loss'"):
        batch.select(rule, 4)
    with pytest.raises(ValueError, match="extras must hold 'holdout'.*got none"):
        rule.select(batch.stats, 4)
    with pytest.raises(ValueError, match=r"holdout must be \(n,\)"):
        rule.select(batch.stats, 4, extras={"holdout": torch.zeros(3)})
    with pytest.raises(TypeError, match="holdout must be a Tensor"):
        rule.select(batch.stats, 4, extras={"holdout": [0.0] * 64})
