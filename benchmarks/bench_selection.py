"""One selection step, from a minibatch's logits to the chosen rows and weights: our rules against those of others.

Only like is compared with like: matching with matching, sampling by loss rank with the same; then all our rules beside
each other. The residual and the bias are of the last-layer gradients of a softmax model on real digits (or gaussian
clusters) halfway through its training: a residual of 1 is that of no gradient at all, and random rows lie above it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import selbp
from benchmarks.gradients import STAGES, samples, train
from benchmarks.harness import Case, Unavailable, suite
from benchmarks.peers import selection as peers
from selbp import ops
from selbp.selectors import GradientProxies
from selbp.types import BatchStatistics, Selection

DRAWS, SECONDS = 1000, 1.0  # of a rule that draws, for its mean residual and its bias; whichever comes first

RULES: dict[str, Callable[[], selbp.Selector]] = {
    "Random": selbp.Random,
    "TopLoss": selbp.TopLoss,
    "TopLoss, refit": lambda: selbp.TopLoss(weights="refit"),
    "TopGradNorm": selbp.TopGradNorm,
    "TopGradNorm, refit": lambda: selbp.TopGradNorm(weights="refit"),
    "LossPercentile": selbp.LossPercentile,
    "LossPercentile, unbiased": lambda: selbp.LossPercentile(p_min=0.05, weights="unbiased"),
    "LossRank, unbiased": lambda: selbp.LossRank(weights="unbiased"),
    "GradNormImportance": selbp.GradNormImportance,
    "GradientMatching, raw (GradMatch's rule)": lambda: selbp.GradientMatching(rule="raw"),
    "DivBS": selbp.DivBS,
    "ReducibleLoss": selbp.ReducibleLoss,
}


@cache
def _minibatch(source: str, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, classes, features, and the Gram matrix of the gradients in float64."""
    features, target = samples(source, n)
    residual = train(features, target, STAGES["middle"])
    probability = residual + torch.nn.functional.one_hot(target, residual.shape[1])
    gram = (residual @ residual.T) * (features @ features.T + 1.0)
    return probability.clamp(min=1e-30).log().float(), target, features.float(), gram


def _inputs(source: str, n: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits, target, features, gram = (x.to(device) for x in _minibatch(source, n))
    return logits, target, features, gram


def _ours(k: int, rule: selbp.Selector, logits: Tensor, target: Tensor, features: Tensor, _: Tensor) -> Selection:
    if rule.needs == "nothing":
        return rule.select(BatchStatistics.unscored(torch.ones_like(target, dtype=torch.bool)), k)
    scored = rule.needs != "loss"  # such a rule is not given the features
    stats = ops.cross_entropy_statistics(logits, target, features if scored else None)
    proxies = GradientProxies(lambda: ops.residual(logits, target, stats.lse), features)
    return rule.select(stats, k, proxies=proxies, extras={"irreducible_loss": torch.zeros_like(stats.loss)})


def _theirs(k: int, peer: Any, logits: Tensor, target: Tensor, features: Tensor, _: Tensor) -> Tensor:
    return peer(logits, target, features, k)


def weights_of(result: Selection | Tensor, n: int) -> Tensor:
    """(n,) float64: the weight of each row, 0 for one that was not chosen."""
    if isinstance(result, Tensor):
        return result.double()
    indices, weights = result
    return torch.zeros(n, dtype=torch.float64, device=indices.device).index_add_(0, indices, weights.double())


def quality(call: Callable[[], Any], results: list[Any], inputs: tuple[Any, ...]) -> Mapping[str, float]:
    """The mean residual and the bias over many draws, relative to the norm of the mean gradient.

    With e = w - 1/n and K the Gram matrix, ``|sum w g - mean|^2 = e' K e``. The expected e is the mean over the draws;
    what chance adds to its square, the trace of its covariance under K, is taken out and reported as ``bias_error``.
    """
    gram = inputs[3]
    n = len(gram)
    found = [weights_of(result, n) for result in results]
    end = time.perf_counter() + SECONDS
    while len(found) < 2 or (len(found) < DRAWS and time.perf_counter() < end):
        found.append(weights_of(call(), n))
        if len(found) == 2 and torch.equal(found[0], found[1]):
            break  # draws nothing: one is as good as all
    errors = torch.stack(found) - 1.0 / n
    norm_sq = gram.mean()
    squares = ((errors @ gram) * errors).sum(1) / norm_sq
    expected = errors.mean(0)
    bias_sq = expected @ gram @ expected / norm_sq
    chance = (squares.mean() - bias_sq).clamp(min=0.0) / (len(found) - 1)
    return {
        "residual": float(squares.clamp(min=0.0).sqrt().mean()),
        "bias": float((bias_sq - chance).clamp(min=0.0).sqrt()),
        "bias_error": float(chance.sqrt()),
    }


def _against(kind: str, ours: selbp.Selector, others: Mapping[str, Any], source: str, n: int, k: int) -> Case:
    classes, d = (10 if source == "digits" else 100), 512
    contenders: dict[str, Any] = {"ours": partial(_ours, k, ours)}
    for name, other in others.items():
        contenders[name] = other if isinstance(other, Unavailable) else partial(_theirs, k, other)
    return Case(
        f"{kind} n={n} C={classes} d={d} k={k}",
        partial(_inputs, source, n),
        contenders,
        quick=n <= 128,
        rounds=5,
        quality=quality,
    )


def _matching(source: str, n: int, k: int) -> Case:
    others = {
        "CORDS OrthogonalMP_REG (its CPU path)": peers.cords("OrthogonalMP_REG")
        if n <= 128
        else Unavailable("left out: 3 to 12 s a call"),
        "CORDS OrthogonalMP_REG_Parallel_V1 (its GPU path)": peers.cords("OrthogonalMP_REG_Parallel_V1"),
        "scikit-learn orthogonal_mp_gram": peers.scikit_learn(),
        "SPAMS omp": peers.spams(),
    }
    case = _against("gradient matching", selbp.GradientMatching(), others, source, n, k)
    classes, d = (10 if source == "digits" else 100), 512
    return replace(
        case,
        flops=n * (n + 1) * (classes + d) + 4 * n * classes * d,
        nbytes=4 * n * (classes + d),
        formula="the Gram matrix, n (n + 1)(C + d), and the mean gradient, 4 n C d flops; the solve not counted",
    )


def _rank(source: str, n: int, k: int) -> Case:
    others = {"Composer select_using_loss": peers.composer()}
    return _against("sampling by loss rank", selbp.LossRank(), others, source, n, k)


def _rules(source: str, n: int, k: int) -> Case:
    case = _against("every rule of ours", selbp.GradientMatching(), {}, source, n, k)
    variants = {f"ours: {name}": partial(_ours, k, build()) for name, build in RULES.items()}
    return replace(case, contenders={**case.contenders, **variants})


SHAPES = (("digits", 128, 32), ("clusters", 512, 128))
CASES = [build(*shape) for shape in SHAPES for build in (_matching, _rank, _rules)]
test_selection = suite(CASES)
