"""Inputs, options and the measure of error that the interpreter tests share.

Every kernel is held to the specification in float64 on the very same (rounded) inputs. Its error may be at most twice
that of eager torch in float32 on these inputs, plus one unit in the last place of a float32 result. Eager in the
input's own dtype is worse wherever that is bfloat16 or float16, so this is the stricter bound.
"""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

with contextlib.suppress(ImportError):  # they need Triton 3.4; a CPU's tests share the inputs alone
    from selbp.triton_kernels.combine import finalize
    from selbp.triton_kernels.statistics import logits_statistics, statistics
    from selbp.triton_kernels.target_logit import target_logit

ULP = 2.0**-23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "everything": {"class_weight": True, "label_smoothing": 0.2, "softcap": 7.0},
}


def every_option() -> list:
    """(dtype, option) of the tests: each option in float32, the two ends of the options in the others; slow: the rest.

    A dtype changes how a kernel loads and rounds, an option what it computes: no branch depends on both.
    """
    return [
        pytest.param(dtype, option, id=f"{dtype}-{option}", marks=() if fast else pytest.mark.slow)
        for dtype in DTYPES
        for option in OPTIONS
        for fast in [dtype == torch.float32 or option == ("plain" if dtype == torch.float16 else "everything")]
    ]


@dataclasses.dataclass
class Case:
    """A minibatch, its head and the options of the loss."""

    features: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> Case:
        weight = self.options.get("class_weight")
        options = self.options if weight is None else {**self.options, "class_weight": weight.to(dtype)}
        bias = None if self.bias is None else self.bias.to(dtype)
        return Case(self.features.to(dtype), self.weight.to(dtype), bias, self.target, options)

    @property
    def logits(self) -> torch.Tensor:
        """In float32 at least: the product of what the kernel is given, rounded once to the inputs' dtype."""
        wide = self.to(torch.float64 if self.features.dtype == torch.float64 else torch.float32)
        return torch.nn.functional.linear(wide.features, wide.weight, wide.bias).to(self.features.dtype)


def make(n, d, n_classes, dtype=torch.float32, option="plain", bias=False, seed=0, confident=True) -> Case:
    """A case with ignored rows, classes of weight 0, and, with ``confident``, rows whose target leads."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    features, weight = normal(n, d), normal(n_classes, d) * 0.3
    target = torch.randint(0, n_classes, (n,), generator=generator)
    if confident and n_classes > 1:
        target[::3] = (features @ weight.T).argmax(1)[::3]
        features[::6] *= torch.linspace(1.0, 2.0, len(features[::6]))[:, None]
    target[1::7] = -100
    options = dict(OPTIONS[option])
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(n_classes, generator=generator)
        options["class_weight"][:: max(n_classes // 3, 2)] = 0.0
    return Case(features, weight, normal(n_classes) if bias else None, target, options).to(dtype)


def run_linear(case: Case, tile, splits=None):
    """The kernels' (loss, lse, residual_sq, feature_sq, correct, valid) from features and weight."""
    options = case.options
    smooth = options.get("label_smoothing", 0.0) != 0.0
    z, feature_sq = target_logit(
        case.target,
        len(case.weight),
        features=case.features,
        weight=case.weight,
        bias=case.bias,
        plus=float(case.bias is not None),
    )
    partials, _ = statistics(
        case.features,
        case.weight,
        case.bias,
        case.target,
        class_weight=options.get("class_weight"),
        smooth=smooth,
        softcap=options.get("softcap", 0.0),
        tile=tile,
        splits=splits,
    )
    return _join(partials, z, feature_sq, case, len(case.weight))


def run_logits(logits, case: Case, tile, splits=None, features=None, plus=0.0):
    """The same from stored logits."""
    options = case.options
    smooth = options.get("label_smoothing", 0.0) != 0.0
    z, feature_sq = target_logit(case.target, logits.shape[1], features=features, logits=logits, plus=plus)
    partials = logits_statistics(
        logits,
        case.target,
        class_weight=options.get("class_weight"),
        smooth=smooth,
        softcap=options.get("softcap", 0.0),
        tile=tile,
        splits=splits,
    )
    return _join(partials, z, feature_sq, case, logits.shape[1])


def _join(partials, z, feature_sq, case, n_classes):
    loss, lse, residual_sq, _, correct, valid = finalize(
        partials, z, feature_sq, case.target, n_classes, **case.options
    )
    return loss, lse, residual_sq, feature_sq, correct, valid


def relative_error(got: torch.Tensor, spec: torch.Tensor, smallest: float) -> float:
    """Greatest |got - spec| / max(|spec|, smallest) over the finite entries."""
    keep = spec.isfinite()
    if not keep.any():
        return 0.0
    error = (got.double()[keep] - spec[keep]).abs() / spec[keep].abs().clamp_min(smallest)
    return float(error.max())


def assert_close(name, got, spec, eager, smallest=1e-30, factor=2.0):
    """``got`` is finite where ``spec`` is and its error is at most ``factor`` times eager's plus one ulp."""
    assert got.dtype == torch.float32, name
    assert torch.equal(got.isfinite(), spec.isfinite()), f"{name}: finite entries differ"
    ours, theirs = relative_error(got, spec, smallest), relative_error(eager, spec, smallest)
    if spec.numel() < 64:
        # The greatest of so few errors says little about eager's accuracy; about four roundings are unavoidable.
        theirs = max(theirs, 2 * ULP)
    assert ours <= factor * theirs + ULP, f"{name}: error {ours:.2e}, eager's {theirs:.2e}"


def assert_statistics(got, spec, eager, smallest=1e-30):
    """All six fields against the specification; ``smallest`` is the value from which errors are relative.

    lse crosses 0 and is measured against 1. From features and weight a logit has itself an error of 2^-24 sum |h w|,
    whatever its product's order, and the loss of a confident row follows it: such cases pass ``smallest=0.1``.
    """
    for index, name in enumerate(("loss", "lse", "residual_sq", "feature_sq")):
        assert_close(name, got[index], spec[index], eager[index], 1.0 if name == "lse" else smallest)
    assert torch.equal(got[5], spec[5]), "valid"
    assert torch.equal(got[4], spec[4]), "correct"


@contextlib.contextmanager
def no_deterministic_fill():
    """Without the NaN fill of torch.empty, for views of memory that must stay untouched."""
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True)
