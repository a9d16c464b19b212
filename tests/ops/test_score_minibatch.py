"""A minibatch's scores in one native call: what the operators one by one give, and torch's between them."""

from importlib import import_module

import pytest
import torch
from support import kernel_cases as cases
from support.factors import DTYPES, Rows, unit

MODULE = import_module("selbp.ops.score_minibatch")
SHAPES = {  # n, d, C
    "no_rows": (0, 3, 4),
    "one": (1, 1, 1),
    "small": (128, 64, 10),
    "no_width": (5, 0, 3),
    "ragged": (67, 33, 37),
    "wider_than_a_block": (9, 4, 2100),
}
NAMES = ("loss", "lse", "residual_sq", "feature_sq", "correct", "valid", "mass", "scaled", "scale", "hits", "residual")


def drawn(name, dtype, option="plain"):
    """The operator's packed arguments without ``factors``; rows that are ignored, and that are not finite."""
    n, d, n_classes = SHAPES[name]
    case = cases.make(n, d, n_classes, dtype, option, bias=True)
    logits = (case.features @ case.weight.T + case.bias) if d else torch.ones(n, n_classes, dtype=dtype)
    if d:
        case.features[3::11, 0] = torch.nan
    logits[2::13, 0] = torch.inf
    options = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, **case.options}
    return MODULE._pack(logits, case.target, case.features, *options.values(), True)


def check(found, wanted, arguments):
    """Equal bits but for the residual and, of float64 masses, the unit, which round elsewhere.

    The residual is (T p - s w) D: the unit is a factor of T and s before the product and not after it, four roundings
    in all and so many more; s w may cancel T p. The unit is a sum over n rows.
    """
    logits, options = arguments[0], arguments[3]
    eps = unit(logits.dtype)
    scale = wanted[8].item()
    in_unit = eps * logits.shape[0] if logits.dtype == torch.float64 else 0.0
    weight = 1.0 if options.class_weight is None else options.class_weight.double().max().item()
    for name, a, b in zip(NAMES, found[:11], wanted[:11], strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        rounding = {"residual": 4 * eps + in_unit, "residual_sq": 2 * in_unit, "scaled": in_unit, "scale": in_unit}
        relative = rounding.get(name, 0.0)
        absolute = 4 * eps * scale * options.label_smoothing * weight if name == "residual" else 0.0
        assert torch.allclose(a.double(), b.double(), relative, absolute, equal_nan=True), name
    assert torch.equal(found[11], wanted[11])


@pytest.mark.parametrize("factors", MODULE.FACTORS)
@pytest.mark.parametrize("option", ["plain", "weight", "smoothing", "everything"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_is_the_operators_in_turn(name, dtype, option, factors):
    arguments = drawn(name, dtype, option)
    found = MODULE._cpu(*arguments, factors)
    check(found, MODULE._composed(*arguments, factors), arguments)
    dead = ~found[5]
    assert not found[10][dead[: len(found[10])]].any() and not found[11][dead[: len(found[11])]].any()


def test_without_features():
    logits, target, _, options, bias = drawn("ragged", torch.float32)
    arguments = (logits, target, None, options, bias)
    for factors in ("none", "residual"):
        found = MODULE._cpu(*arguments, factors)
        check(found, MODULE._composed(*arguments, factors), arguments)
        assert (found[3] == 1).all()


@pytest.mark.parametrize("transform", Rows.TRANSFORMS.values(), ids=Rows.TRANSFORMS)
def test_any_strides(transform):
    logits, target, features, options, bias = drawn("ragged", torch.float32, "everything")
    wanted = MODULE._cpu(logits, target, features, options, bias, "both")
    weight = options.class_weight.repeat_interleave(2)[::2]
    strided = transform(logits), target.repeat_interleave(3)[::3], transform(features)
    found = MODULE._cpu(*strided, options._replace(class_weight=weight), bias, "both")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, wanted, strict=True))


def test_no_row_is_valid():
    logits, target, features, options, bias = drawn("ragged", torch.float32)
    arguments = (logits, torch.full_like(target, -100), features, options, bias)
    found = MODULE._cpu(*arguments, "both")
    check(found, MODULE._composed(*arguments, "both"), arguments)
    assert found[8] == 0 and not found[10].any() and not found[9].any()


def test_the_number_of_threads_changes_nothing(monkeypatch):
    arguments = drawn("ragged", torch.float32, "everything")
    one = MODULE._cpu(*arguments, "both")
    monkeypatch.setattr(MODULE, "native_threads", lambda work: 3)
    three = MODULE._cpu(*arguments, "both")
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(three, one, strict=True))


MUTANTS = {
    "the_unit_once": (2, lambda found: found[2] / found[8]),
    "an_invalid_row_counts": (8, lambda found: found[8] * (1 + 1 / 128)),
    "out_of_the_unit": (10, lambda found: found[10] * (1 + 2e-6)),
    "a_row_that_is_not_valid": (10, lambda found: found[10] + (~found[5])[:, None] * 1e-6),
    "hits_the_other_way": (9, lambda found: found[9].flip(0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name):
    arguments = drawn("small", torch.float32)
    found = list(MODULE._cpu(*arguments, "residual"))
    wanted = MODULE._composed(*arguments, "residual")
    check(found, wanted, arguments)
    place, change = MUTANTS[name]
    found[place] = change(found)
    with pytest.raises(AssertionError):
        check(found, wanted, arguments)


@pytest.mark.parametrize("factors", MODULE.FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registered_for_fake_tensors_and_autograd(dtype, factors):
    logits, target, features, options, bias = drawn("small", dtype, "weight")
    logits, features = logits.nan_to_num(0.0, 0.0), features.nan_to_num(0.0)  # for opcheck no NaN equals another
    arguments = (logits, target, features, *options, bias, factors)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.selbp.score_minibatch.default, arguments, test_utils=checks)
