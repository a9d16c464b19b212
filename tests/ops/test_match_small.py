"""Gram matrix, mean gradient and match in one call: what the three give one after the other, bit for bit."""

from importlib import import_module

import pytest
import torch
from support.factors import DTYPES, Rows, draw

import selbp
from selbp import ops
from selbp.ops.match_small import match_small
from selbp.reference.sampling import fill_spare

MODULE = import_module("selbp.ops.match_small")
OPTIONS = {"bias": True, "rule": "ols", "ridge": 1e-3, "nonnegative": True}
SHAPES = {  # n, C, d, k; with k <= n / 3 the rows of the Gram matrix are formed on demand
    "one": (1, 1, 1, 1),
    "small": (128, 10, 64, 32),
    "small_whole_gram": (128, 10, 64, 43),
    "long_rows": (67, 5, 300, 22),
    "one_of_a_block_more": (65, 129, 4, 3),
    "narrow": (37, 3, 5, 9),
    "wider_than_a_block": (130, 2, 131, 130),
    "many_rows": (300, 4, 6, 20),
    "large": (250, 90, 60, 12),
    "no_rows": (0, 3, 4, 2),
    "none_chosen": (20, 3, 4, 0),
}


def in_turn(residual, features, valid, k, *, bias, **options):
    """Rows and weights by the three operators, one after the other."""
    gram, mean = ops.gradient_gram(residual, features, bias=bias), ops.mean_gradient(residual, features, bias=bias)
    found = ops.match(gram, mean.inner, mean.target_sq, k, valid=valid, **options)
    return fill_spare(found.indices, found.indices >= 0, valid)[0], found.weights


def check(found, wanted):
    """The same numbers, and a NaN where there is one."""
    for name, a, b in zip(("indices", "weights"), found, wanted, strict=True):
        assert torch.equal(a.nan_to_num(12345.0), b.nan_to_num(12345.0)), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "no_rows"])
def test_is_the_three_in_turn(name, dtype, bias):
    n, n_classes, d, k = SHAPES[name]
    residual, features = draw(n, n_classes, d, dtype)
    valid = torch.arange(n) % 5 != 3
    options = {**OPTIONS, "bias": bias}
    check(match_small(residual, features, valid, k, **options), in_turn(residual, features, valid, k, **options))


@pytest.mark.parametrize("rule", ["ols", "normalized", "raw"])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_every_option(rule, nonnegative, ridge):
    residual, features = draw(60, 5, 7)
    valid = torch.arange(60) != 2
    options = {"bias": True, "rule": rule, "ridge": ridge, "nonnegative": nonnegative}
    check(match_small(residual, features, valid, 20, **options), in_turn(residual, features, valid, 20, **options))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
@pytest.mark.parametrize("which", [0, 1], ids=["residual", "features"])
@pytest.mark.parametrize("flagged", [True, False])
def test_a_row_that_is_not_finite_spoils_no_other(value, which, flagged):
    factors = list(draw(40, 6, 9))
    factors[which][7, 3] = value
    valid = torch.ones(40, dtype=torch.bool)
    valid[7] = not flagged
    found = indices, weights = match_small(*factors, valid, 10, **OPTIONS)
    check(found, in_turn(*factors, valid, 10, **OPTIONS))
    if value != 3e38:  # a gradient of zero
        assert 7 not in indices and weights.isfinite().all() and weights.count_nonzero() == 10
        factors[0][7], factors[1][7] = 0.0, 0.0
        without = match_small(*factors, valid, 10, **OPTIONS)
        assert torch.equal(indices, without[0])
        assert torch.allclose(weights, without[1], rtol=1e-3)


@pytest.mark.parametrize("good", [0, 1, 3])
def test_spare_slots_repeat_the_first_row(good):
    residual, features = draw(30, 4, 5)
    valid = torch.zeros(30, dtype=torch.bool)
    valid[11 : 11 + good] = True
    found = indices, weights = match_small(residual, features, valid, 6, **OPTIONS)
    check(found, in_turn(residual, features, valid, 6, **OPTIONS))
    assert (weights[good:] == 0).all() and (indices[good:] == (indices[0] if good else 0)).all()


def test_spare_slots_of_a_zero_gradient_are_valid_rows():
    residual, features = torch.zeros(30, 4), torch.ones(30, 5)
    valid = torch.arange(30) >= 4
    indices, weights = match_small(residual, features, valid, 3, **OPTIONS)
    assert indices.tolist() == [4, 4, 4] and (weights == 0).all()


@pytest.mark.parametrize("transform", Rows.TRANSFORMS.values(), ids=Rows.TRANSFORMS)
def test_any_strides(transform):
    residual, features = draw(50, 6, 9)
    valid = torch.ones(100, dtype=torch.bool)[::2]
    found = match_small(transform(residual), transform(features), valid, 7, **OPTIONS)
    check(found, match_small(residual, features, valid, 7, **OPTIONS))


def test_no_rows():
    residual, features = draw(0, 3, 4)
    with pytest.raises((IndexError, ValueError, RuntimeError)):  # as a slot's spare row does not exist
        match_small(residual, features, torch.ones(0, dtype=torch.bool), 2, **OPTIONS)


def counted(monkeypatch, finite=None):
    calls, native = [], MODULE._native.match_gradients

    def call(*arguments):
        calls.append(arguments)
        said = native(*arguments)
        return said if finite is None else finite

    monkeypatch.setattr(MODULE._native, "match_gradients", call)
    return calls


@pytest.mark.parametrize("changed", [{}, {"rule": "raw", "nonnegative": False}, {"ridge": 0.0}], ids=str)
def test_the_selector_chooses_by_it(monkeypatch, changed):
    calls = counted(monkeypatch)
    logits, features, target = torch.randn(64, 5), torch.randn(64, 9), torch.randint(5, (64,))
    stats = ops.cross_entropy_statistics(logits, target, features)
    residual = ops.residual(logits, target, stats.lse)
    rule = selbp.GradientMatching(**changed)
    proxies, known = selbp.GradientProxies(residual, features), selbp.GradientProxies(residual, features)
    gram, mean = known.gram(), known.mean_gradient()
    found, wanted = (rule.select(stats, 16, proxies=p) for p in (proxies, known))
    assert len(calls) == 1  # for the other the Gram matrix was there
    assert torch.equal(found.indices, wanted.indices) and torch.equal(found.weights, wanted.weights)
    assert torch.equal(proxies.gram(), gram) and torch.equal(proxies.mean_gradient().inner, mean.inner)


@pytest.mark.parametrize(
    "options", [{"weights": "mean"}, {"weights": "batch"}, {"unit_sum": 1.0}], ids=["mean", "batch", "unit_sum"]
)
def test_other_weights_go_the_long_way(monkeypatch, options):
    rule = selbp.GradientMatching(**options)
    calls = counted(monkeypatch)
    residual, features = draw(40, 5, 6)
    stats = ops.cross_entropy_statistics(torch.randn(40, 5), torch.randint(5, (40,)), features)
    assert len(rule.select(stats, 8, proxies=selbp.GradientProxies(residual, features)).indices) == 8
    assert not calls


def test_proxies_of_another_kind_keep_their_own_gram(monkeypatch):
    class Doubled(selbp.GradientProxies):
        def gram(self):
            return 2.0 * super().gram()

    calls = counted(monkeypatch)
    residual, features = draw(40, 5, 6)
    stats = ops.cross_entropy_statistics(torch.randn(40, 5), torch.randint(5, (40,)), features)
    plain, other = (
        selbp.GradientMatching().select(stats, 8, proxies=kind(residual, features))
        for kind in (selbp.GradientProxies, Doubled)
    )
    assert len(calls) == 1 and not torch.equal(plain.weights, other.weights)


def test_proxies_of_other_samples_are_refused():
    stats = ops.cross_entropy_statistics(torch.randn(40, 5), torch.randint(5, (40,)))
    with pytest.raises(ValueError, match="proxies must be of the n = 40 samples of stats, got 39"):
        selbp.GradientMatching().select(stats, 8, proxies=selbp.GradientProxies(*draw(39, 5, 6)))


def test_the_long_way_gives_the_same(monkeypatch):
    residual, features = draw(64, 5, 9)
    valid = torch.arange(64) != 9
    wanted = match_small(residual, features, valid, 16, **OPTIONS)
    assert counted(monkeypatch, finite=False) == []
    check(match_small(residual, features, valid, 16, **OPTIONS), wanted)


MUTANTS = {
    "another_row": lambda indices, weights: (indices.roll(1), weights),
    "weights_lost": lambda indices, weights: (indices, weights * (1 + 2e-7)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    residual, features = draw(40, 5, 6)
    valid = torch.ones(40, dtype=torch.bool)
    with pytest.raises(AssertionError):
        check(
            MUTANTS[name](*match_small(residual, features, valid, 8, **OPTIONS)),
            in_turn(residual, features, valid, 8, **OPTIONS),
        )


def test_registered_for_compile_fake_and_autograd():
    operator = torch.ops.selbp.match_small.default
    for dtype in DTYPES:
        residual, features = draw(9, 4, 5, dtype)
        valid = torch.ones(9, dtype=torch.bool)
        torch.library.opcheck(operator, (residual, features, valid, True, 3, "ols", 1e-3, True))
        torch.library.opcheck(
            operator, (residual.requires_grad_(), features.requires_grad_(), valid, False, 3, "raw", 0.0, False)
        )


def test_compiles_in_one_graph():
    residual, features = draw(40, 6, 7)
    valid = torch.ones(40, dtype=torch.bool)

    def both(r, h):
        indices, weights = match_small(r, h, valid, 5, **OPTIONS)
        return indices + 1, weights * 2

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(residual, features), both(residual, features), strict=True):
        assert torch.equal(got, wanted)
