"""Gram matrix, mean gradient and match in one call: what the three give one after the other, bit for bit."""

import pytest
import torch
from support.factors import DTYPES, draw

import selbp
from selbp import ops
from selbp.ops.match_gradients import match_gradients
from selbp.reference.sampling import fill_spare

OPTIONS = {"bias": True, "rule": "ols", "ridge": 1e-3, "nonnegative": True}
SHAPES = {"one": (1, 1, 1, 1), "small": (64, 10, 32, 16), "many_rows": (300, 4, 6, 20), "none_chosen": (20, 3, 4, 0)}


def numbers(indices, weights, gram, mean):
    return {"indices": indices, "weights": weights, "gram": gram, **mean._asdict()}


def in_turn(residual, features, valid, k, *, bias, **options):
    gram, mean = ops.gradient_gram(residual, features, bias=bias), ops.mean_gradient(residual, features, bias=bias)
    found = ops.match(gram, mean.inner, mean.target_sq, k, valid=valid, **options)
    return fill_spare(found.indices, found.indices >= 0, valid)[0], found.weights, gram, mean


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_three_in_turn(name, dtype, bias):
    n, n_classes, d, k = SHAPES[name]
    residual, features = draw(n, n_classes, d, dtype)
    valid, options = torch.arange(n) % 5 != 3, {**OPTIONS, "bias": bias}
    found = numbers(*match_gradients(residual, features, valid, k, **options))
    for part, wanted in numbers(*in_turn(residual, features, valid, k, **options)).items():
        assert (found[part] is None) == (wanted is None), part
        assert wanted is None or torch.equal(found[part], wanted), part


@pytest.mark.parametrize("spoiled", [False, True], ids=["too few rows", "a number is not finite"])
def test_spare_slots(spoiled):
    """They repeat the first row that was chosen; where none was, the first valid one."""
    residual, features = draw(300, 4, 6)
    valid = torch.zeros(300, dtype=torch.bool)
    valid[5:8] = True
    if spoiled:
        residual[6] = features[6] = 1e30  # its squares overflow: the solver refuses the whole problem
    found = match_gradients(residual, features, valid, 9, **OPTIONS)
    wanted = in_turn(residual, features, valid, 9, **OPTIONS)
    assert torch.equal(found.indices, wanted[0]) and torch.equal(found.weights, wanted[1])
    assert (found.indices[3:] == (5 if spoiled else found.indices[0])).all()


def test_the_rule_keeps_what_it_matched():
    residual, features = draw(300, 4, 6)
    logits, target = torch.randn(300, 4), torch.zeros(300, dtype=torch.int64)
    stats, proxies = selbp.ops.cross_entropy_statistics(logits, target), selbp.GradientProxies(residual, features)
    selbp.GradientMatching().select(stats, 20, proxies=proxies)
    assert proxies.factors() is None  # both are known
    assert torch.equal(proxies.gram(), ops.gradient_gram(residual, features, bias=True))


def test_registered_for_compile_fake_and_autograd():
    residual, features = draw(9, 4, 5)
    arguments = (residual.requires_grad_(), features.requires_grad_(), torch.ones(9, dtype=torch.bool))
    for bias in (True, False):
        problem = (*arguments, bias, 3, "ols", 1e-3, True)
        torch.library.opcheck(torch.ops.selbp.match_gradients.default, problem)
