"""Rules that only studies name."""

from __future__ import annotations

import pytest
import torch

import selbp
from selbp.selectors import GradientProxies
from selbp.types import BatchStatistics
from selbp_study.arms import build_selector
from selbp_study.ideas import AveragedTarget

N, CLASSES, WIDTH, K = 40, 5, 7, 8


def minibatch(seed: int, scale: float = 1.0) -> tuple[BatchStatistics, GradientProxies]:
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(N, CLASSES, generator=generator, dtype=torch.float64) * scale
    features = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64)
    stats = BatchStatistics.unscored(torch.ones(N, dtype=torch.bool))
    return stats._replace(loss=stats.loss.double()), GradientProxies(residual, features)


def gradients(proxies: GradientProxies) -> torch.Tensor:
    """(N, CLASSES * (WIDTH + 1)) every sample's gradient, written out."""
    features = torch.cat([proxies.features, proxies.features.new_ones(N, 1)], 1)
    return torch.einsum("nc,nd->ncd", proxies.residual, features).flatten(1)


def test_without_decay_it_is_matching() -> None:
    stats, proxies = minibatch(0)
    for got, want in zip(
        AveragedTarget(decay=0.0).select(stats, K, proxies=proxies),
        selbp.GradientMatching().select(stats, K, proxies=proxies),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_the_target_is_the_average_in_units_of_the_gradients_size() -> None:
    """The weights are those of nonnegative least squares on the chosen rows against the average, written out."""
    rule, ridge, average = AveragedTarget(decay=0.75, ridge=1e-3), 1e-3, 0.0
    for step, scale in enumerate((1.0, 30.0, 0.1), start=1):
        stats, proxies = minibatch(step, scale)
        chosen, weights = rule.select(stats, K, proxies=proxies)
        g = gradients(proxies)
        size = g.square().sum(1).mean().sqrt()
        average = 0.75 * average + 0.25 * g.mean(0) / size
        target = average * size / (1 - 0.75**step)
        rows = torch.cat([g[chosen].T, (ridge * g.square().sum(1).mean()).sqrt() * torch.eye(K, dtype=g.dtype)])
        best = selbp.ops.nnls(rows, torch.cat([target, target.new_zeros(K)]))
        torch.testing.assert_close(weights, best, rtol=1e-6, atol=1e-9)


def test_its_memory_is_its_state() -> None:
    one, other = AveragedTarget(), AveragedTarget()
    stats, proxies = minibatch(0)
    one.select(stats, K, proxies=proxies)
    other.load_state_dict(one.state_dict())
    stats, proxies = minibatch(1)
    assert torch.equal(one.select(stats, K, proxies=proxies).weights, other.select(stats, K, proxies=proxies).weights)
    with pytest.raises(ValueError, match="average"):
        other.load_state_dict({})


def test_a_study_names_it_and_the_library_does_not() -> None:
    assert isinstance(build_selector("matching-average:decay=0.5"), AveragedTarget)
    assert not hasattr(selbp, "AveragedTarget")
    for options in ("decay=1.0", "decay=-1", "ridge=-1"):
        with pytest.raises(ValueError, match="decay|ridge"):
            build_selector(f"matching-average:{options}")
