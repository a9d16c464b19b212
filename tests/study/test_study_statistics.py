"""The study's statistics against scipy, and the words that come of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from selbp_study.statistics import Difference, holm, paired, t_quantile, t_tail


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 29, 100])
def test_the_t_distribution(degrees: int) -> None:
    for t in (0.0, 0.3, 1.0, -2.0, 2.776, 7.0, 40.0):
        assert t_tail(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-12)
    for tail in (0.5, 0.05, 0.001):
        assert t_quantile(tail, degrees) == pytest.approx(stats.t.isf(tail / 2, degrees), rel=1e-9)
    with pytest.raises(ValueError, match="degrees"):
        t_tail(1.0, 0)
    with pytest.raises(ValueError, match="tail"):
        t_quantile(1.0, 3)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_paired_differences_and_their_interval(n: int) -> None:
    generator = np.random.default_rng(n)
    mine, theirs = generator.normal(80, 1, n), generator.normal(79, 1, n)
    found = paired(dict(enumerate(mine)), dict(reversed(list(enumerate(theirs)))))  # by seed, not by position
    test = stats.ttest_rel(mine, theirs)
    low, high = test.confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.p == pytest.approx(test.pvalue) and found.pairs == n
    assert (found.verdict() == "no difference") == (low <= 0 <= high)


def test_only_common_seeds_count() -> None:
    found = paired({0: 1.0, 1: 2.0, 2: 4.0}, {1: 1.0, 2: 1.0, 9: 5.0})
    assert found.mean == 2.0 and found.pairs == 2
    one = paired({0: 1.0}, {0: 3.0, 1: 2.0})
    assert one == Difference(-2.0, None, None, 1) and one.verdict() == "-" and one.text() == "-2.00"
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert paired({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).verdict() == "no difference"
    assert paired({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0}).verdict() == "ahead"


def test_verdicts() -> None:
    assert Difference(0.5, 0.4, 0.02, 5).verdict() == "ahead" and Difference(-0.5, 0.4, 0.02, 5).verdict() == "behind"
    assert Difference(0.5, 0.6, 0.08, 5).verdict() == "no difference"
    assert Difference(0.5, 0.4, 0.02, 5).verdict(p=0.06) == "no difference"  # after a correction
    assert Difference(0.5, 0.4, 0.02, 5).text() == "+0.50 [+0.10, +0.90]"


def test_holm_by_its_definition() -> None:
    assert holm([]) == [] and holm([0.03]) == [0.03]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9, 0.6]) == [1.0, 1.0, 1.0]
    for values in itertools.permutations([0.001, 0.012, 0.03, 0.2]):
        adjusted = dict(zip(values, holm(list(values)), strict=True))
        assert adjusted == pytest.approx({0.001: 0.004, 0.012: 0.036, 0.03: 0.06, 0.2: 0.2})
