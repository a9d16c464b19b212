"""E[sum_j w_j g_j] = (1/n) sum_i g_i for every mode that says so: a z-test that a wrong weight must fail."""

import pytest
import torch
from support.selection_cases import Batch

import selbp
from selbp.selectors import Selection

DRAWS = 10_000
WARM_UP = 40  # calls after which a history is full and a running mean has settled
LIMIT = 4.5  # two-sided, 12 to 40 components: a correct rule passes with probability > 0.999 for any seed

UNBIASED = [
    selbp.Random(),
    selbp.LossPercentile(p_min=0.05, weights="unbiased"),
    selbp.LossRank(weights="unbiased"),
    selbp.GradNormImportance(),
    selbp.GradNormImportance(norm="gradient"),
    selbp.GradNormImportance(replacement=True),
    selbp.GradNormImportance(threshold=1.1),
    selbp.GradNormImportance(threshold=1e6),
]


def drawn(stats, selector, k, draws=DRAWS, seed=7):
    """(draws, k) indices and weights of independent calls of ``select``, all at once, its memory settled beforehand."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(WARM_UP):
        selector.select(stats, k, generator=generator)

    def one(_):
        return tuple(selector.select(stats, k, generator=generator))

    indices, weights = torch.vmap(one, randomness="different")(torch.zeros(draws))
    assert indices.shape == weights.shape == (draws, k)
    return indices, weights


def z_scores(batch, selector, k, draws=DRAWS):
    """Of the mean of ``draws`` selected gradients against the minibatch's, in every component; and their variance."""
    indices, weights = drawn(batch.stats, selector, k, draws)
    dense = torch.zeros(draws, len(batch.loss), dtype=torch.float64).scatter_add_(1, indices, weights.double())
    steps = dense @ batch.gradients
    return (steps.mean(0) - batch.mean) / (steps.std(0) / draws**0.5), steps.var(0).sum()


@pytest.mark.parametrize("selector", [selbp.Random(), selbp.GradNormImportance(threshold=1.1)], ids=repr)
def test_draws_made_at_once_are_those_made_one_by_one(selector):
    """Each row comes as often, and with the same mean weight, as in a loop of calls."""
    stats, k = Batch(n=24).stats, 6
    at_once = drawn(stats, selector, k)
    generator = torch.Generator().manual_seed(8)
    loop = [selector.select(stats, k, generator=generator) for _ in range(2000)]
    one_by_one = tuple(torch.stack(list(field)) for field in zip(*loop, strict=True))
    share, weight = [], []
    for indices, weights in (at_once, one_by_one):
        count = torch.bincount(indices.flatten(), minlength=24)
        share.append(count / len(indices))
        weight.append(torch.bincount(indices.flatten(), weights.flatten().double(), minlength=24) / count)
    deviation = (share[0] * (1 - share[0]) * (1 / 2000 + 1 / DRAWS)).sqrt()
    assert ((share[0] - share[1]).abs() <= LIMIT * deviation + 1e-7).all()
    torch.testing.assert_close(*weight)


@pytest.mark.parametrize("selector", UNBIASED, ids=repr)
def test_unbiased(selector):
    z, _ = z_scores(Batch(), selector, 16)
    assert z.abs().max() < LIMIT


@pytest.mark.parametrize("selector", UNBIASED, ids=repr)
def test_unbiased_with_rows_that_are_not_valid(selector):
    z, _ = z_scores(Batch(n=40, valid=torch.arange(40) % 4 != 1), selector, 12)
    assert z.abs().max() < LIMIT


def test_unbiased_with_rows_without_a_gradient():
    batch = Batch(n=40)
    batch.residual[::3] = 0.0
    batch.refresh()
    for selector in (selbp.GradNormImportance(), selbp.GradNormImportance(replacement=True)):
        z, _ = z_scores(batch, selector, 10)
        assert z.abs().max() < LIMIT


class Sequential:
    """The mutant: rows drawn one after another without replacement, weighted as if drawn with it."""

    def select(self, stats, k, *, generator=None):
        odds = stats.residual_sq.sqrt()
        odds = odds / odds.sum()
        indices = torch.multinomial(odds, k, generator=generator)
        return Selection(indices, 1.0 / (len(odds) * k * odds[indices]))


def test_sequential_draws_with_weights_of_replacement_are_biased():
    z, _ = z_scores(Batch(n=128), Sequential(), 32)
    assert z.abs().max() > 2 * LIMIT


@pytest.mark.parametrize(
    "selector", [selbp.LossPercentile(), selbp.LossRank(), selbp.GradNormImportance(weights="mean")], ids=repr
)
def test_equal_weights_on_unequal_odds_are_biased(selector):
    """The test's power: rules that do not call themselves unbiased fail it."""
    z, _ = z_scores(Batch(), selector, 16)
    assert z.abs().max() > 2 * LIMIT


def test_norms_lower_the_variance():
    batch = Batch()
    _, uniform = z_scores(batch, selbp.Random(), 16)
    _, by_residual = z_scores(batch, selbp.GradNormImportance(), 16)
    _, by_gradient = z_scores(batch, selbp.GradNormImportance(norm="gradient"), 16)
    assert by_gradient < by_residual < 0.7 * uniform


@pytest.mark.parametrize("k", [1, 16, 40])
def test_random_keeps_every_row_equally_often(k):
    kept, _ = drawn(Batch(n=40).stats, selbp.Random(), k, seed=2)
    share = torch.bincount(kept.flatten(), minlength=40) / DRAWS
    deviation = (k / 40 * (1 - k / 40) / DRAWS) ** 0.5
    assert ((share - k / 40).abs() <= 4.5 * deviation + 1e-7).all()


def test_loss_rank_keeps_at_its_odds():
    """Inclusion probabilities are ((rank + 1/2) / n)^(n/k - 1), scaled to sum to k."""
    k, batch = 8, Batch(n=32)
    kept, _ = drawn(batch.stats, selbp.LossRank(), k, seed=3)
    share = torch.bincount(kept.flatten(), minlength=32).double() / DRAWS
    odds = (torch.arange(32, dtype=torch.float64) + 0.5).div(32).pow(3)
    expected = (k * odds / odds.sum()).clamp(max=1)
    assert expected.max() < 1
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((share[batch.loss.argsort()] - expected).abs() <= 4.5 * deviation).all()


def test_loss_percentile_keeps_at_its_odds():
    k, batch = 8, Batch(n=32)
    kept, _ = drawn(batch.stats, selbp.LossPercentile(p_min=0.01), k, seed=3)
    share = torch.bincount(kept.flatten(), minlength=32).double() / DRAWS
    odds = torch.arange(32, dtype=torch.float64).div(32).pow(3).clamp(min=0.01)
    expected = k * odds / odds.sum()
    assert expected.max() < 1
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((share[batch.loss.argsort()] - expected).abs() <= 4.5 * deviation).all()


def test_divbs_draws_by_what_the_rows_so_far_do_not_span():
    """All ordered pairs, and every third row, at the odds of the rule with explicit gradients and projections."""
    draws, n = 6000, 6
    batch = Batch(n=n, classes=2, d=3)
    batch.features += 2.0  # rows much alike: what one takes out matters to the others
    batch.refresh()
    g, e = batch.gradients, batch.mean

    def odds(chosen):
        left = e
        if chosen:
            basis = torch.linalg.qr(g[list(chosen)].T).Q
            left = e - basis @ (basis.T @ e)
        correlation = (g @ left).abs()
        correlation[list(chosen)] = 0.0
        return correlation / correlation.sum()

    pairs, third = torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for i in range(n):
        pairs[i] = odds([])[i] * odds([i])
        for j in set(range(n)) - {i}:
            third += pairs[i, j] * odds([i, j])

    proxies, rule, generator = batch.proxies, selbp.DivBS(), torch.Generator().manual_seed(4)
    picks = torch.stack(
        [rule.select(batch.stats, 3, proxies=proxies, generator=generator).indices for _ in range(draws)]
    )
    for codes, expected in ((picks[:, 0] * n + picks[:, 1], pairs.flatten()), (picks[:, 2], third)):
        share = torch.bincount(codes, minlength=len(expected)).double() / draws
        deviation = (expected * (1 - expected) / draws).sqrt()
        assert ((share - expected).abs() <= LIMIT * deviation + 1e-12).all()
