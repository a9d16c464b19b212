"""Every operator on a GPU against the specification in float64: an error may be twice eager torch's plus a rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts import choices, minibatch
from gpu_parts.results import Results
from selbp import ops, reference

OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"class_weight": True, "label_smoothing": 0.2, "softcap": 7.0},
)


def error(got: Tensor, spec: Tensor) -> float:
    """Greatest difference, relative to the greatest entry, over the finite entries of the specification."""
    keep = spec.isfinite()
    scale = spec[keep].abs().max().clamp_min(1e-30)
    return float(((got.double() - spec)[keep].abs() / scale).max())


Compare = Callable[[str, Tensor, Tensor, Tensor], None]


def _compare(results: Results, name: str, got: Tensor, spec: Tensor, eager: Tensor) -> None:
    """Hold ``got`` to twice the error of ``eager``, plus four roundings of float32."""
    ours, theirs = error(got, spec), error(eager, spec)
    results.add(name, ours <= 2.0 * theirs + 2.0**-21, error=ours, eager=theirs)


def parity(
    results: Results, dtype: torch.dtype, option: dict[str, object], shape: tuple[int, int, int], device: str
) -> None:
    """Every operator at one shape (n, d, C)."""
    compare = partial(_compare, results)
    n, d, n_classes = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).to(device, dtype)
    weight = (torch.randn(n_classes, d, generator=generator) / d**0.5).to(device, dtype)
    bias = torch.randn(n_classes, generator=generator).to(device, dtype)
    target = torch.randint(n_classes, (n,), generator=generator).to(device)
    target[::7] = -100
    options = dict(option)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.rand(n_classes, generator=generator).to(device)
    wide = {**options, **({"class_weight": options["class_weight"].double()} if "class_weight" in options else {})}
    label = f"{str(dtype).removeprefix('torch.')} {shape} {sorted(option)}"

    got = ops.linear_cross_entropy_statistics(features, weight, bias, target, **options)
    spec = reference.linear_cross_entropy_statistics(features.double(), weight.double(), bias.double(), target, **wide)
    eager = reference.linear_cross_entropy_statistics(features, weight, bias, target, **options)
    for field in ("loss", "lse", "residual_sq", "feature_sq"):
        compare(f"linear statistics {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    results.add(f"linear statistics valid {label}", torch.equal(got.valid, spec.valid))

    logits = F.linear(features, weight, bias)
    got = ops.cross_entropy_statistics(logits, target, features, **options)
    spec = reference.cross_entropy_statistics(logits.double(), target, features.double(), **wide)
    eager = reference.cross_entropy_statistics(logits.float(), target, features.float(), **options)
    for field in ("loss", "lse", "residual_sq"):
        compare(f"statistics {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    r = ops.residual(logits, target, got.lse, **options)
    compare(
        f"residual {label}",
        r,
        reference.residual(logits.double(), target, got.lse.double(), **wide),
        reference.residual(logits.float(), target, got.lse, **options),
    )
    r, h = r.to(dtype), features
    compare(
        f"gram {label}",
        ops.gradient_gram(r, h),
        reference.gradient_gram(r.double(), h.double()),
        reference.gradient_gram(r, h),
    )
    got, spec = ops.mean_gradient(r, h), reference.mean_gradient(r.double(), h.double())
    eager = reference.mean_gradient(r, h)
    for field in ("inner", "head_weight", "head_bias"):
        compare(f"mean gradient {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    backward(compare, label, features, weight, bias, target, options, wide)
    if "label_smoothing" not in options:
        skipping(results, label, (features, weight * 4, bias), target, options, wide)

    tokens = math.gcd(n, 10)
    h, y = features.view(n // tokens, tokens, d), target.view(n // tokens, tokens)
    left, right = ops.sketch_projections(n_classes, d + 1, (16, 16), dtype=dtype, device=device)  # exact in any dtype
    compare(
        f"sketch {label}",
        ops.sketch(h, weight, bias, y, (left, right), **options),
        reference.sketch(h.double(), weight.double(), bias.double(), y, left.double(), right.double(), **wide),
        reference.sketch(h, weight, bias, y, left, right, **options),
    )


def backward(
    compare: Compare,
    label: str,
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    options: dict,
    wide: dict,
) -> None:
    """Gradients of linear_cross_entropy against autograd's through eager torch."""

    def gradients(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (features, weight, bias)]
        if ours:
            loss = ops.linear_cross_entropy(*inputs, target, **options).sum()
        else:
            chosen = wide if dtype == torch.float64 else options
            logits = reference.soft_cap(F.linear(*inputs), chosen.get("softcap", 0.0))
            weights = chosen.get("class_weight")
            loss = F.cross_entropy(
                logits,
                target,
                weight=None if weights is None else weights.to(dtype),
                reduction="sum",
                label_smoothing=chosen.get("label_smoothing", 0.0),
            )
        return list(torch.autograd.grad(loss, inputs))

    ours, eager = gradients(features.dtype, True), gradients(features.dtype, False)
    for name, a, b, c in zip(("features", "weight", "bias"), ours, gradients(torch.float64, False), eager, strict=True):
        compare(f"gradient of {name} {label}", a, b, c)


def skipping(
    results: Results, label: str, head: tuple[Tensor, Tensor, Tensor], target: Tensor, options: dict, wide: dict
) -> None:
    """What skip_mass leaves out against the bounds of its documentation, as parts of them."""

    def gradients(dtype: torch.dtype, skip_mass: float) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in head]
        chosen = wide if dtype == torch.float64 else options
        loss = ops.linear_cross_entropy(*inputs, target, skip_mass=skip_mass, **chosen)
        return [x.double() for x in torch.autograd.grad(loss.sum(), inputs)]

    features, weight, bias = (x.double() for x in head)
    exact, rounded = gradients(torch.float64, 0.0), gradients(head[0].dtype, 0.0)
    z = reference.soft_cap(F.linear(features, weight, bias), wide.get("softcap", 0.0))
    y = target.clamp(min=0)[:, None]
    rest = torch.exp(z.scatter(1, y, -math.inf).logsumexp(1) - z.logsumexp(1))
    for skip_mass in (0.02, 0.3, 1.0):
        found = gradients(head[0].dtype, skip_mass)
        e = torch.where(target >= 0, 2 * skip_mass * rest, 0.0)
        bounds = e * weight.norm(dim=1).max(), (e * features.norm(dim=1)).sum(), e.sum()
        sizes = (lambda x: x.norm(dim=1), lambda x: x.norm(dim=1).sum(), lambda x: x.abs().sum())
        for name, a, b, c, bound, size in zip(
            ("features", "weight", "bias"), found, exact, rounded, bounds, sizes, strict=True
        ):
            slack = 3 * size(c - b) + 2.0**-20 * size(b) + 1e-30  # what is rounded without as well
            part = float(((size(a - b) - slack) / bound.clamp_min(1e-30)).max())
            results.add(f"skip_mass={skip_mass} {name} {label}", part <= 1.0, error=max(part, 0.0))


def cases(tiny: bool) -> list[tuple[torch.dtype, dict[str, object], tuple[int, int, int]]]:
    """Types, options and shapes (n, d, C)."""
    shapes = [(10, 8, 21)] if tiny else [(1, 8, 1), (300, 257, 1003), (512, 512, 32000)]
    types = (torch.float32, torch.bfloat16, torch.float16)
    return [(dtype, option, shape) for shape in shapes for dtype in types for option in OPTIONS]


def run(results: Results, device: str, tiny: bool) -> None:
    """All cases; several processes share them."""
    for dtype, option, shape in cases(tiny):
        work = partial(parity, results, dtype, option, shape, device)
        results.row(f"parity of {dtype} {shape} {sorted(option)}", work)
    choices.run(results, device, tiny)
    minibatch.run(results, device, tiny)
