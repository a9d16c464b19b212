"""The cube method: inclusion probabilities, balance, an unbiased mean gradient of low variance, and bugs that show."""

import pytest
import torch
from support.selection_cases import Batch
from torch import Tensor

import selbp
from selbp import reference
from selbp.ops import cube, cube_sample
from selbp.reference.sampling import inclusion_probabilities

F64 = torch.float64
LIMIT = 4.5  # of z, as in test_unbiased


def problem(n: int, p: int, k: int, *, seed: int, equal: bool = False) -> tuple[Tensor, Tensor]:
    """Balance (n, p) and probabilities that sum to k."""
    generator = torch.Generator().manual_seed(seed)
    odds = torch.ones(n, dtype=F64) if equal else torch.rand(n, generator=generator, dtype=F64) + 0.05
    return torch.randn(n, p, generator=generator, dtype=F64), inclusion_probabilities(odds, k)


def draws_of(n: int, seed: int) -> tuple[Tensor, Tensor]:
    numbers = torch.rand(2, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return numbers[0].argsort(), numbers[1]


@pytest.mark.parametrize(
    "n, p, k", [(1, 1, 1), (2, 1, 1), (7, 3, 3), (12, 20, 5), (24, 0, 8), (40, 8, 16), (40, 4, 40)]
)
@pytest.mark.parametrize("equal", [True, False])
def test_the_native_walk_is_the_spec(n: int, p: int, k: int, equal: bool) -> None:
    for seed in range(3):
        x, probability = problem(n, p, k, seed=seed, equal=equal)
        order, draws = draws_of(n, seed)
        chosen = torch.ops.selbp.cube_sample(x, probability, order, draws)
        assert torch.equal(chosen, reference.cube_sample(x, probability, order, draws))
        assert int(chosen.sum()) == k
        assert chosen[probability >= 1].all()


@pytest.mark.parametrize(
    "make", [torch.zeros_like, torch.ones_like, lambda x: x[:, :1].expand_as(x), lambda x: 1e12 * x]
)
def test_dependent_or_large_columns(make) -> None:
    """Constraints that say nothing, repeat each other, or tower over the size's."""
    for seed in range(20):
        x, probability = problem(30, 5, 9, seed=seed)
        assert int(cube_sample(make(x), probability, torch.Generator().manual_seed(seed)).sum()) == 9


def totals(x: Tensor, probability: Tensor, draws: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Share of draws that each unit is in, and the (draws, p) Horvitz-Thompson totals."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.stack([cube_sample(x, probability, generator) for _ in range(draws)]).to(F64)
    return samples.mean(0), samples @ (x / probability[:, None])


def z_of(share: Tensor, probability: Tensor, draws: int) -> Tensor:
    return (share - probability) / (probability * (1 - probability) / draws).sqrt()


def test_inclusion_probabilities_and_balance() -> None:
    n, p, k, draws = 96, 4, 32, 2000
    x, probability = problem(n, p, k, seed=1)
    open_ = probability < 1
    share, estimates = totals(x, probability, draws)
    assert z_of(share, probability, draws)[open_].abs().max() < LIMIT
    independent = (x.square() * ((1 - probability) / probability)[:, None]).sum(0)  # variance of Poisson draws
    assert (estimates.var(0) < 0.3 * independent).all()  # the landing's: some 5 of the 96 units
    z = (estimates.mean(0) - x.sum(0)) / (estimates.std(0) / draws**0.5)
    assert z.abs().max() < LIMIT


def test_a_planted_bug_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either end of a walk drawn with probability 1/2, whatever their distances: the point drifts."""
    real = torch.ops.selbp.cube_sample

    def even(x: Tensor, probability: Tensor, order: Tensor, draws: Tensor) -> Tensor:
        return real(x, probability, order, torch.where(draws < 0.5, 0.0, 0.999999).to(draws))

    n, draws = 8, 3000
    x, probability = problem(n, 2, 3, seed=1)
    for implementation, fits in ((real, True), (even, False)):
        monkeypatch.setattr(cube, "_cube", implementation)
        share, _ = totals(x, probability, draws)
        assert bool(z_of(share, probability, draws).abs().max() < LIMIT) == fits


def errors(selector, batch: Batch, k: int, draws: int) -> tuple[Tensor, Tensor]:
    """z-scores of the mean of ``draws`` selected gradients, and the mean squared error of one."""
    generator, steps, proxies = torch.Generator().manual_seed(3), [], batch.proxies
    for _ in range(draws):
        indices, weights = selector.select(batch.stats, k, proxies=proxies, generator=generator)
        steps.append(weights.to(F64) @ batch.gradients[indices])
    found = torch.stack(steps)
    z = (found.mean(0) - batch.mean) / (found.std(0) / draws**0.5)
    return z, (found - batch.mean).square().sum(1).mean()


@pytest.mark.parametrize("probabilities", ["uniform", "gradnorm"])
@pytest.mark.parametrize("valid", [None, torch.arange(40) % 4 != 1], ids=["all", "some"])
def test_the_mean_gradient_is_unbiased(probabilities: str, valid: Tensor | None) -> None:
    z, _ = errors(selbp.CubeSampling(probabilities=probabilities), Batch(n=40, valid=valid), 12, 1500)
    assert z.abs().max() < LIMIT


def test_the_variance_is_far_below_that_of_random_rows() -> None:
    """Gradients of low rank, as a network's are: 5 classes x 8 features, of which 6 directions carry most."""
    batch, k = Batch(n=64), 16
    _, random = errors(selbp.Random(), batch, k, 600)
    _, importance = errors(selbp.GradNormImportance(norm="gradient"), batch, k, 600)
    _, balanced = errors(selbp.CubeSampling(probabilities="uniform"), batch, k, 600)
    _, both = errors(selbp.CubeSampling(), batch, k, 600)
    assert balanced < 0.8 * random
    assert both < 0.75 * importance < 0.75 * random


def test_rows_without_a_gradient_are_left_to_chance_only_where_none_has_one() -> None:
    batch = Batch(n=24)
    batch.residual[3:] = 0.0
    batch.refresh()
    indices, weights = batch.select(selbp.CubeSampling(), 8)
    assert indices[:3].tolist() == [0, 1, 2] and (weights[:3] == 1 / 24).all() and (weights[3:] == 0).all()
    batch.residual[:] = 0.0
    batch.refresh()
    indices, weights = batch.select(selbp.CubeSampling(), 8)
    assert len(set(indices.tolist())) == 8 and torch.allclose(weights, torch.full_like(weights, 1 / 8))


def test_draws_come_from_the_generator_alone() -> None:
    batch = Batch(n=32)
    one, two = (batch.select(selbp.CubeSampling(), 8, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    other = batch.select(selbp.CubeSampling(), 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(one.indices, two.indices) and not torch.equal(one.indices, other.indices)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: selbp.CubeSampling(dimensions=0), ValueError, "dimensions must be at least 1, got 0"),
        (lambda: selbp.CubeSampling(dimensions=2.0), TypeError, "dimensions must be an int or None"),
        (lambda: selbp.CubeSampling(probabilities="loss"), ValueError, "probabilities must be one of"),
        (lambda: cube_sample(torch.zeros(3), torch.zeros(3)), ValueError, "balance must be"),
        (lambda: cube_sample(torch.zeros(3, 1), torch.zeros(4)), ValueError, "probability must be"),
        (lambda: cube_sample(torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3)), TypeError, "balance must be"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, text) -> None:
    with pytest.raises(error, match=text):
        make()
