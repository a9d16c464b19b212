"""The CUDA implementations of the operators, run on CPU tensors through the interpreter: the launches in order."""

import importlib

import kernel_cases as cases
import pytest
import torch

from selbp import reference
from selbp.ops import _triton

gram_operator, residual_operator, statistics_operator = (
    importlib.import_module(f"selbp.ops.{name}") for name in ("gram", "residual", "statistics")
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
    got = statistics_operator._cuda(logits, case.target, layout(case.features), *options(case).values(), True)
    cases.assert_statistics(got, spec, eager)
    spec = reference.linear_cross_entropy_statistics(wide.features, wide.weight, wide.bias, wide.target, **wide.options)
    eager = reference.linear_cross_entropy_statistics(
        case.features, case.weight, case.bias, case.target, **case.options
    )
    got = statistics_operator._linear_cuda(
        layout(case.features), layout(case.weight), case.bias, case.target, *options(case).values()
    )
    cases.assert_statistics(got, spec, eager, smallest=0.1)


@pytest.mark.parametrize("option", ["plain", "everything"])
def test_residual_and_gram(option):
    case = cases.make(21, 16, 90, option=option)
    logits = strided(case.logits)
    lse = torch.logsumexp(reference.soft_cap(logits, case.options.get("softcap", 0.0)), 1)
    got = residual_operator._cuda(logits, case.target, lse, *options(case).values())
    spec = reference.residual(logits.double(), case.target, lse.double(), **case.to(torch.float64).options)
    eager = reference.residual(logits, case.target, lse, **case.options)
    cases.assert_close("residual", got, spec, eager, smallest=1e-2)
    product = gram_operator._cuda(got, strided(case.features), True)
    spec = reference.gradient_gram(got.double(), case.features.double())
    scale = spec.diagonal().max()
    eager = reference.gradient_gram(got, case.features)
    cases.assert_close("gram", product / scale.float(), spec / scale, eager / scale, smallest=1.0)


def test_float64_and_missing_triton_take_the_reference(monkeypatch):
    case = cases.make(9, 4, 12).to(torch.float64)
    assert _triton.kernels("cross_entropy", case.features) is None
    got = statistics_operator._linear_cuda(case.features, case.weight, case.bias, case.target, *options(case).values())
    assert got[0].dtype == torch.float64
    assert _triton.kernels("cross_entropy", torch.empty(1)) is not None
    monkeypatch.setattr(_triton, "unavailable", lambda: "gone")
    assert _triton.kernels("cross_entropy", torch.empty(1)) is None
