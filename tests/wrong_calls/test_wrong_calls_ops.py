"""Wrong calls of the operators: each is refused with words that name the argument, what it must be and what came.

The same table serves ``selbp.ops.*`` and ``torch.ops.selbp.*`` (by position), the second also on the meta device, where
nothing but the fake runs. A direct call that is not refused could read out of bounds.
"""

import re

import numpy as np
import pytest
import torch
from support.operator_calls import (
    NAN,
    ONLY_DIRECT,
    ONLY_VALUES,
    PRIVATE,
    RIGHT,
    WRONG,
    C,
    D,
    N,
    f,
    i,
    meta,
    through_the_function,
)

from selbp import ops
from selbp._checks import shown
from selbp.types import Selection

# An error of a type or dtype says what kind of thing must come; any other is one of a value.
OF_TYPE = (
    r"must (be|have) (a|an|the dtype|int64|float32|float64|bool|True|a dense)\b|must have \.indices|one of .*got None"
)


def kind(words):
    """The error that says these words."""
    return TypeError if re.search(OF_TYPE, words) else ValueError


def table(*groups):
    cases = [(name, change, words) for group in groups for name, rows in group.items() for change, words in rows]
    names = [f"{name}-{number}-{'-'.join(change)}" for number, (name, change, _) in enumerate(cases)]
    return [pytest.param(*case, id=name) for case, name in zip(cases, names, strict=True)]


@pytest.mark.parametrize("name", RIGHT)
def test_right_calls_pass(name):
    """Else the table would prove nothing."""
    getattr(torch.ops.selbp, name)(*RIGHT[name].values())
    getattr(torch.ops.selbp, name)(*(meta(x) if isinstance(x, torch.Tensor) else x for x in RIGHT[name].values()))
    if name not in PRIVATE:
        through_the_function(name, RIGHT[name])


@pytest.mark.parametrize("name,change,words", table(WRONG, ONLY_DIRECT, ONLY_VALUES))
def test_called_by_name(name, change, words):
    with pytest.raises(kind(words), match=words):
        getattr(torch.ops.selbp, name)(*{**RIGHT[name], **change}.values())


DENSE = [  # a sparse tensor cannot move to the meta device
    case
    for case in table(WRONG, ONLY_DIRECT)
    if all(x.layout == torch.strided for x in case.values[1].values() if isinstance(x, torch.Tensor))
]


@pytest.mark.parametrize("name,change,words", DENSE)
def test_on_the_meta_device(name, change, words):
    """The fake refuses what the backends refuse. Devices that differ: the one argument stays where it is."""
    if "on the device" in words:
        change = {key: torch.zeros_like(x, device="cpu") for key, x in change.items()}
        words = words.replace("cpu, got meta", "meta, got cpu")
    else:
        change = {key: meta(x) if isinstance(x, torch.Tensor) else x for key, x in change.items()}
    right = {key: meta(x) if isinstance(x, torch.Tensor) else x for key, x in RIGHT[name].items()}
    with pytest.raises(kind(words), match=words):
        getattr(torch.ops.selbp, name)(*{**right, **change}.values())


@pytest.mark.parametrize(
    "name,change,words",
    [  # cube_sample draws its order itself
        case for case in table(WRONG, ONLY_VALUES) if case.values[0] not in PRIVATE and "order" not in case.values[1]
    ],
)
def test_through_the_function(name, change, words):
    with pytest.raises(kind(words), match=words.replace(r"\(n,\) with n = 4 .*got", r"\(4,\), got")):
        through_the_function(name, {**RIGHT[name], **change})


NUMBERS = {
    "cross_entropy_statistics": ("label_smoothing", "softcap"),
    "linear_cross_entropy": ("label_smoothing", "softcap", "skip_mass"),
    "linear_cross_entropy_statistics": ("label_smoothing", "softcap"),
    "residual": ("label_smoothing", "softcap"),
    "sketch": ("label_smoothing", "softcap"),
    "match": ("ridge", "tolerance"),
}
INTEGERS = {name: "k" if name == "match" else "ignore_index" for name in NUMBERS}
TENSORS = {
    "cross_entropy_statistics": ("logits", "target"),
    "linear_cross_entropy": ("features", "weight", "target"),
    "linear_cross_entropy_statistics": ("features", "weight", "target"),
    "residual": ("logits", "target", "lse"),
    "gradient_gram": ("residual", "features"),
    "mean_gradient": ("residual", "features"),
    "match": ("gram", "inner", "target_sq"),
    "sketch": ("features", "weight", "target"),
    "cube_sample": ("balance", "probability"),
}
OPTIONAL = {
    "cross_entropy_statistics": ("features", "class_weight"),
    "linear_cross_entropy": ("bias", "class_weight", "rows"),
    "linear_cross_entropy_statistics": ("bias", "class_weight"),
    "residual": ("class_weight",),
    "match": ("valid",),
    "sketch": ("bias", "class_weight"),
}
FLAGS = {
    "cross_entropy_statistics": "bias",
    "gradient_gram": "bias",
    "mean_gradient": "bias",
    "matching_residual": "bias",
    "match": "nonnegative",
}
NO_NUMBERS = (True, "0.1", None, torch.tensor(0.1), 1j)
NO_INTEGERS = (True, 1.0, "1", torch.tensor(1), np.float32(1))


def kind_of(value):
    return type(value).__name__


def of_types(arguments, wanted, values, got=kind_of):
    """Calls with each value in the place of each argument that wants another type."""
    for name, places in arguments.items():
        for place in (places,) if isinstance(places, str) else places:
            for value in values:
                yield name, {place: value}, f"{place} must be {wanted}, got {re.escape(got(value))}"


TYPES = [
    *of_types(NUMBERS, "a number", NO_NUMBERS, shown),
    *of_types(INTEGERS, "an int", NO_INTEGERS, shown),
    *((n, {a: 1 << 70}, f"{a} must fit into 64 bits, got 1180591620717411303424") for n, a in INTEGERS.items()),
    *of_types(TENSORS, "a Tensor", ([0.0], np.zeros(4), None)),
    *of_types(OPTIONAL, "a Tensor or None", ([1],)),
    *of_types(FLAGS, "True or False", (1, None, f(C)), shown),
    ("match", {"rule": None}, "rule must be one of 'ols', 'normalized', 'raw', got None"),
    ("linear_cross_entropy", {"return_statistics": 1}, "return_statistics must be True or False, got 1"),
]


@pytest.mark.parametrize(
    "name,change,words", TYPES, ids=[f"{n}-{number}-{'-'.join(c)}" for number, (n, c, _) in enumerate(TYPES)]
)
def test_types(name, change, words):
    with pytest.raises(kind(words), match=words):
        through_the_function(name, {**RIGHT[name], **change})


OTHERS = {
    "nnls a": (lambda: ops.nnls([1.0], f(3)), "a must be a Tensor, got list"),
    "nnls a dim": (lambda: ops.nnls(f(3), f(3)), r"a must be \(..., m, n\), got \(3,\)"),
    "nnls a dtype": (lambda: ops.nnls(i(3, 2), f(3)), "a must be float32, .*got int64"),
    "nnls b": (lambda: ops.nnls(f(3, 2), None), "b must be a Tensor, got NoneType"),
    "nnls b shape": (lambda: ops.nnls(f(3, 2), f(2)), r"b must be \(..., m\) = \(3,\), got \(2,\)"),
    "nnls b dtype": (lambda: ops.nnls(f(3, 2), i(3)), "b must be float32, .*got int64"),
    "nnls b device": (lambda: ops.nnls(f(3, 2), meta(f(3))), "b must be on the device of a, cpu, got meta"),
    "nnls ridge": (lambda: ops.nnls(f(3, 2), f(3), ridge=-1), "ridge must be at least 0 and finite, got -1"),
    "nnls ridge bool": (lambda: ops.nnls(f(3, 2), f(3), ridge=True), "ridge must be a number, got True"),
    "nnls_gram gram": (lambda: ops.nnls_gram([1.0], f(3)), "gram must be a Tensor, got list"),
    "nnls_gram shape": (lambda: ops.nnls_gram(f(3, 2), f(3)), r"gram must be \(..., n, n\), got \(3, 2\)"),
    "nnls_gram inner": (lambda: ops.nnls_gram(f(3, 3), f(2)), r"inner must be \(..., n\) = \(3,\), got \(2,\)"),
    "nnls_gram device": (
        lambda: ops.nnls_gram(f(3, 3), meta(f(3))),
        "inner must be on the device of gram, cpu, got meta",
    ),
    "nnls_gram valid": (lambda: ops.nnls_gram(f(3, 3), f(3), valid=f(3)), "valid must be bool, got float32"),
    "nnls_gram valid device": (
        lambda: ops.nnls_gram(f(3, 3), f(3), valid=meta(f(3) > 0)),
        "valid must be on the device of gram, cpu, got meta",
    ),
    "nnls_gram ridge": (
        lambda: ops.nnls_gram(f(3, 3), f(3), ridge=NAN),
        "ridge must be at least 0 and finite, got nan",
    ),
    "matching_residual selection": (
        lambda: ops.matching_residual(f(N, C), f(N, D), (i(2), f(2))),
        "selection must have .indices and .weights, got tuple",
    ),
    "matching_residual indices": (
        lambda: ops.matching_residual(f(N, C), f(N, D), Selection([0], f(1))),
        "selection.indices must be a Tensor, got list",
    ),
    "sketch projections": (
        lambda: ops.sketch(f(2, 3, D), f(C, D), None, i(2, 3), f(C, 2)),
        "projections must be a pair of Tensors, got Tensor",
    ),
    "sketch one projection": (
        lambda: ops.sketch(f(2, 3, D), f(C, D), None, i(2, 3), (f(C, 2),)),
        "projections must be a pair of Tensors, got ",
    ),
    "sketch projection": (
        lambda: ops.sketch(f(2, 3, D), f(C, D), None, i(2, 3), (f(C, 2), 3)),
        r"projections\[1\] must be a Tensor, got int",
    ),
    "sketch_gram": (lambda: ops.sketch_gram(f(3, 2)), r"sketches must be \(n, p, q\), got \(3, 2\)"),
    "sketch_gram type": (lambda: ops.sketch_gram(None), "sketches must be a Tensor, got NoneType"),
    "projections kind": (
        lambda: ops.sketch_projections(3, 4, kind="x"),
        "kind must be one of 'sign', 'gaussian', got 'x'",
    ),
    "projections dimensions": (
        lambda: ops.sketch_projections(3, 4, (2, 0)),
        r"dimensions must be two positive integers \(p, q\), got \(2, 0\)",
    ),
    "projections one dimension": (
        lambda: ops.sketch_projections(3, 4, 5),
        r"dimensions must be two positive integers \(p, q\), got 5",
    ),
    "projections float dimension": (
        lambda: ops.sketch_projections(3, 4, (2.0, 2)),
        r"dimensions\[0\] must be an int, got 2.0",
    ),
    "projections classes": (lambda: ops.sketch_projections(-3, 4), "n_classes must be at least 0, got -3"),
    "projections width": (lambda: ops.sketch_projections(3, 4.0), "width must be an int, got 4.0"),
    "projections dtype": (lambda: ops.sketch_projections(3, 4, dtype=torch.int64), "dtype must be float32, .*got "),
    "projections seed": (lambda: ops.sketch_projections(3, 4, seed="s"), "seed must be an int, got 's'"),
    "cube_sample generator": (
        lambda: ops.cube_sample(f(N, 2), f(N), 3),
        "generator must be a torch.Generator or None, got int",
    ),
    "cube_sample dtype": (lambda: ops.cube_sample(i(N, 2), f(N)), "balance must be float32, .*got int64"),
}


@pytest.mark.parametrize("call,words", OTHERS.values(), ids=OTHERS.keys())
def test_others(call, words):
    with pytest.raises(kind(words), match=words):
        call()


NUMPY = [np.float32(0.25), np.float64(0.25), np.float16(0.25), np.int64(0), np.int32(1), np.uint8(1)]


@pytest.mark.parametrize("name,argument", [(n, a) for n, names in NUMBERS.items() for a in names], ids=str)
@pytest.mark.parametrize("value", NUMPY, ids=lambda v: f"{type(v).__name__}-{v}")
def test_numpy_numbers_are_numbers(name, argument, value):
    ours = through_the_function(name, {**RIGHT[name], argument: value})
    expected = through_the_function(name, {**RIGHT[name], argument: float(value)})
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [np.int64(2), np.int32(2), np.uint8(2)], ids=lambda v: type(v).__name__)
def test_numpy_integers_are_integers(name, value):
    ours = through_the_function(name, {**RIGHT[name], INTEGERS[name]: value})
    expected = through_the_function(name, {**RIGHT[name], INTEGERS[name]: 2})
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", FLAGS)
def test_numpy_flags_are_flags(name):
    for value in (True, False):
        through_the_function(name, {**RIGHT[name], FLAGS[name]: np.bool_(value)})
