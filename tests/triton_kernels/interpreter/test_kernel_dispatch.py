"""The CUDA implementations of the operators, run on CPU tensors through the interpreter: the launches in order."""

import importlib

import pytest
import torch
from support import kernel_cases as cases

from selbp import ops, reference
from selbp.ops import _backends

gram_operator, residual_operator, statistics_operator, sketch_operator, head_operator = (
    importlib.import_module(f"selbp.ops.{name}")
    for name in ("gram", "residual", "statistics", "sketch", "linear_cross_entropy")
)  # the package exports functions of the same names
ARGUMENTS = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0}


def options(case):
    return {**ARGUMENTS, **case.options}


def strided(tensor):
    """The same values with a last dimension that is not contiguous."""
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("layout", [lambda x: x, strided], ids=["contiguous", "strided"])
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_statistics(option, layout):
    case = cases.make(21, 16, 90, option=option, bias=True)
    wide, logits = case.to(torch.float64), layout(case.logits)
    spec = reference.cross_entropy_statistics(logits.double(), case.target, wide.features, **wide.options)
    eager = reference.cross_entropy_statistics(logits, case.target, case.features, **case.options)
    got = statistics_operator._cuda(
        *statistics_operator._pack(logits, case.target, layout(case.features), *options(case).values(), True)
    )
    cases.assert_statistics(got, spec, eager)
    spec = reference.linear_cross_entropy_statistics(wide.features, wide.weight, wide.bias, wide.target, **wide.options)
    eager = reference.linear_cross_entropy_statistics(
        case.features, case.weight, case.bias, case.target, **case.options
    )
    got = statistics_operator._linear_cuda(
        *statistics_operator._linear_pack(
            layout(case.features), layout(case.weight), case.bias, case.target, *options(case).values()
        )
    )
    cases.assert_statistics(got, spec, eager, smallest=0.1)


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_residual_and_gram(option):
    case = cases.make(21, 16, 90, option=option)
    logits = strided(case.logits)
    lse = torch.logsumexp(reference.soft_cap(logits, case.options.get("softcap", 0.0)), 1)
    got = residual_operator._cuda(*residual_operator._pack(logits, case.target, lse, *options(case).values()))
    spec = reference.residual(logits.double(), case.target, lse.double(), **case.to(torch.float64).options)
    eager = reference.residual(logits, case.target, lse, **case.options)
    cases.assert_close("residual", got, spec, eager, smallest=1e-2)
    product = gram_operator._cuda(got, strided(case.features), True)
    spec = reference.gradient_gram(got.double(), case.features.double())
    scale = spec.diagonal().max()
    eager = reference.gradient_gram(got, case.features)
    cases.assert_close("gram", product / scale.float(), spec / scale, eager / scale, smallest=1.0)


def everything(case):
    """What each operator gives a row, by name; then the sums over the rows."""
    arguments = tuple(options(case).values())
    head = case.features, case.weight, case.bias, case.target
    rows = len(case.features)
    stored = statistics_operator._cuda(
        *statistics_operator._pack(case.logits, case.target, case.features, *arguments, True)
    )
    residual = residual_operator._cuda(*residual_operator._pack(case.logits, case.target, stored[1], *arguments))
    class_weight, *rest = arguments
    forward = head_operator._cuda.forward(*head_operator._pack(*head, class_weight, None, *rest, False, 0.1))
    d_features, *d_head = head_operator._cuda.backward(
        *head_operator._torch.pack_backward(
            torch.linspace(0.5, 1.0, rows),
            *head,
            forward[1],
            forward[6],
            forward[5],
            forward[7],
            forward[8],
            class_weight,
            None,
            *rest,
            True,
            True,
            True,
        )
    )
    left, right = ops.sketch_projections(len(case.weight), case.features.shape[1] + 1, (8, 8))
    sketches = sketch_operator._cuda(
        *sketch_operator._pack(
            case.features[:, None], case.weight, case.bias, case.target[:, None], left, right, *arguments
        )
    )
    gram = gram_operator._cuda(residual, case.features, True)
    names = ("loss", "lse", "residual_sq", "feature_sq", "correct", "valid")
    found = {
        f"{kind} {name}": x
        for kind, made in (("stored", stored), ("head", forward))
        for name, x in zip(names, made[:6], strict=True)
    }
    return {**found, "residual": residual, "gram": gram, "features": d_features, "sketch": sketches}, d_head


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize(
    ("broken", "option", "value"),
    [
        ([5], "plain", torch.nan),
        ([0, 1, 17], "everything", torch.inf),
        (list(range(21)), "plain", torch.inf),
        (list(range(21)), "everything", torch.nan),
    ],
)
def test_the_other_rows_are_as_if_the_broken_were_ignored(broken, option, value):
    case = cases.make(21, 16, 90, option=option, bias=True)
    case.target[:] = torch.arange(21) + 30
    clean = cases.Case(case.features.clone(), case.weight, case.bias, case.target.clone(), case.options)
    clean.features[broken], clean.target[broken] = 0.0, -100
    case.features[broken, 3] = value
    (got, sums), (expected, expected_sums) = everything(case), everything(clean)
    others = torch.ones(21, dtype=torch.bool).index_fill(0, torch.tensor(broken), False)
    for name, ours in got.items():
        assert torch.equal(ours[others], expected[name][others]), name
    for ours, wanted in zip(sums, expected_sums, strict=True):
        assert torch.equal(ours, wanted)
    for name in ("residual", "gram", "features", "sketch", "stored valid", "head valid"):
        assert not got[name][broken].any(), name


def test_float64_and_missing_triton_take_the_reference(monkeypatch):
    case = cases.make(9, 4, 12).to(torch.float64)
    assert _backends.kernels(case.features) is None
    got = statistics_operator._linear_cuda(
        *statistics_operator._linear_pack(case.features, case.weight, case.bias, case.target, *options(case).values())
    )
    assert got[0].dtype == torch.float64
    assert _backends.kernels(torch.empty(1)) is not None
    monkeypatch.setattr(_backends, "unavailable", lambda: "gone")
    assert _backends.kernels(torch.empty(1)) is None
