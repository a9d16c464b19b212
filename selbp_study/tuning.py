"""The searches for an arm's learning rate, on training data that is held out. They have no way to ask for test data.

A search is a generator: it yields rates (with what belongs to them) and a seed, is sent held-out accuracies, and
returns its choice. What the accuracies are measured on is decided in one place, :func:`tuning_config`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, replace

from selbp_study.config import RunConfig
from selbp_study.data import HELD_OUT, Dataset

RATES = tuple(0.4 / 2**power for power in range(8, -4, -1))  # .0016 to 3.2, in factors of 2
SEEDS = (1000, 1001)  # none that a study reports

Trial = tuple[float | int, float, int]  # keep, rate, seed
Search = Generator[list[Trial], list[float], "Choice"]


@dataclass(frozen=True)
class Choice:
    """A keep and a rate, and the mean held-out accuracy of every pair that was tried, over so many seeds."""

    keep: float | int
    lr: float
    tried: tuple[tuple[float | int, float, float, int], ...]


def tuning_config(config: RunConfig, held_out: Dataset, keep: float | int, lr: float, seed: int) -> RunConfig:
    """``config`` on the held-out split of its training data, evaluated once, at its end."""
    if not held_out.name.endswith(HELD_OUT):
        raise ValueError(f"rates are tuned on held-out training data, not on {held_out.name}")
    return replace(
        config,
        dataset=held_out.name,
        fingerprint=held_out.fingerprint,
        keep=keep,
        lr=lr,
        seed=seed,
        evaluate_every=config.steps,
    )


def nearest(rate: float, rates: Sequence[float] = RATES) -> int:
    """Index of the rate of the grid that is nearest by its ratio."""
    return min(range(len(rates)), key=lambda index: abs(math.log(rates[index] / rate)))


def search_rates(
    keeps: Sequence[float | int], start: float, rates: Sequence[float] = RATES, seeds: Sequence[int] = SEEDS
) -> Search:
    """For each keep, up the hill of the first seed's accuracies from ``start``; then the other seeds for the best two.

    A rate at the foot of the search (fails, or is not finite) has accuracy -inf. The best two of all (keep, rate)
    pairs are judged by the mean over all seeds, so that no arm's rate is one seed's luck.
    """
    first = nearest(start, rates)
    scores: dict[tuple[float | int, int], list[float]] = {}
    asked = [(keep, index) for keep in keeps for index in range(max(0, first - 1), min(len(rates), first + 2))]
    while asked:
        found = yield [(keep, rates[index], seeds[0]) for keep, index in asked]
        scores |= {pair: [score] for pair, score in zip(asked, found, strict=True)}
        asked = []
        for keep in keeps:
            best = max((index for k, index in scores if k == keep), key=lambda index: scores[keep, index][0])
            asked += [
                (keep, index)
                for index in (best - 1, best + 1)
                if 0 <= index < len(rates) and (keep, index) not in scores
            ]
    finalists = sorted(scores, key=lambda pair: -scores[pair][0])[:2]
    if len(seeds) > 1:
        found = yield [(keep, rates[index], seed) for keep, index in finalists for seed in seeds[1:]]
        for place, pair in enumerate(finalists):
            scores[pair] += found[place * (len(seeds) - 1) : (place + 1) * (len(seeds) - 1)]
    means = {pair: sum(values) / len(values) for pair, values in scores.items()}
    keep, index = max(finalists, key=lambda pair: means[pair])
    if means[keep, index] == -math.inf:
        raise _none_works(rates[i] for _, i in scores)
    tried = tuple(
        (k, rates[i], round(means[k, i], 3), len(scores[k, i]))
        for k, i in sorted(scores, key=lambda pair: (str(pair[0]), pair[1]))
    )
    return Choice(keep, rates[index], tried)


def grid(keep: float | int, rates: Sequence[float], seeds: Sequence[int] = SEEDS) -> Search:
    """Every rate with every seed; the best by the mean over the seeds. A rate that fails with one of them is out."""
    found = yield [(keep, rate, seed) for rate in rates for seed in seeds]
    means = {rate: sum(found[i * len(seeds) : (i + 1) * len(seeds)]) / len(seeds) for i, rate in enumerate(rates)}
    tried = tuple((keep, rate, mean, len(seeds)) for rate, mean in means.items() if mean > -math.inf)
    if not tried:
        raise _none_works(rates)
    return Choice(keep, max(tried, key=lambda trial: trial[2])[1], tried)


def _none_works(rates: Iterable[float]) -> ValueError:
    return ValueError(f"every rate fails: {', '.join(f'{rate:g}' for rate in rates)}")
