"""The Gram matrix and the mean gradient, against the full products that bound them and against eager torch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Case, suite
from selbp import ops, reference
from selbp.ops import _gemm


def _factors(n: int, classes: int, features: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    probs = torch.randn(n, classes, device=device).softmax(1)
    target = torch.randint(classes, (n, 1), device=device)
    return probs.scatter_add(1, target, -torch.ones_like(probs[:, :1])).to(dtype), torch.randn(
        n, features, device=device
    ).to(dtype)


def _two_products(product, residual: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return product(residual, residual), product(features, features)


def _fastest(a: Tensor, b: Tensor) -> Tensor:
    return _gemm.linear(a, b) if a.device.type == "cpu" else a @ b.t()


def _case(n: int, classes: int, features: int, dtype: torch.dtype = torch.float32, quick: bool = False) -> Case:
    return Case(
        f"gram n={n} C={classes} d={features} {str(dtype).removeprefix('torch.')}",
        partial(_factors, n, classes, features, dtype),
        {
            "ours": ops.gradient_gram,
            "the two fastest full GEMMs alone": partial(_two_products, _fastest),
            "the two GEMMs of torch.mm alone": partial(_two_products, lambda a, b: torch.mm(a, b.t())),
            "eager torch": reference.gradient_gram,
        },
        flops=n * (n + 1) * (classes + features),
        nbytes=dtype.itemsize * n * (classes + features) + (8 if dtype == torch.float64 else 4) * n * n,
        formula="n (n + 1)(C + d) flops: one triangle of both products; each factor read and K written once",
        dtype=dtype,
        limits={"the two fastest full GEMMs alone": 0.70} if n >= 1024 and dtype != torch.float64 else {},
        quick=quick,
    )


def _mean_case(n: int, classes: int, features: int, quick: bool = False) -> Case:
    return Case(
        f"mean gradient n={n} C={classes} d={features} float32",
        partial(_factors, n, classes, features, torch.float32),
        {
            "ours": ops.mean_gradient,
            "its two GEMMs alone": lambda r, h: _fastest(r, _fastest(r.t(), h.t()).t()),
            "eager torch": reference.mean_gradient,
            "from the Gram matrix: g . mean alone (loses its digits)": lambda r, h: ops.gradient_gram(r, h).mean(1),
        },
        flops=4 * n * classes * features,
        nbytes=4 * (n * (classes + features) + classes * features),
        formula="2 products of 2 n C d flops; each factor read and M written once",
        quick=quick,
    )


def _residual_case(n: int, classes: int, features: int, k: int, quick: bool = False) -> Case:
    def inputs(device: torch.device) -> tuple[Tensor, Tensor, ops.Selection]:
        r, h = _factors(n, classes, features, torch.float32, device)
        return r, h, ops.Selection(torch.randperm(n, device=device)[:k], torch.full((k,), 1 / k, device=device))

    return Case(
        f"matching residual n={n} C={classes} d={features} k={k}",
        inputs,
        {
            "ours": ops.matching_residual,
            "eager torch": lambda r, h, chosen: reference.matching_residual(r, h, chosen.indices, chosen.weights),
        },
        flops=2 * (n + k) * classes * features,
        nbytes=4 * n * (classes + features),
        formula="2 (n + k) C d float64 flops; each factor read once",
        dtype=torch.float64,
        quick=quick,
    )


def _scoring_inputs(n: int, classes: int, features: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    logits, target = torch.randn(n, classes, device=device), torch.randint(classes, (n,), device=device)
    return logits, torch.randn(n, features, device=device), target


def _scoring(logits: Tensor, features: Tensor, target: Tensor) -> tuple[object, ...]:
    """Everything that gradient matching needs of a minibatch."""
    statistics = ops.cross_entropy_statistics(logits, target, features)
    r = ops.residual(logits, target, statistics.lse)
    return statistics, ops.gradient_gram(r, features), ops.mean_gradient(r, features)


def _eager_scoring(logits: Tensor, features: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """The fewest torch calls for loss, norms, correctness, K and b = K 1 / n, which loses digits where M cancels."""
    log_probs = torch.log_softmax(logits, 1)
    loss = torch.nn.functional.nll_loss(log_probs, target, reduction="none")
    r = log_probs.exp_().scatter_add_(1, target[:, None], torch.full_like(loss[:, None], -1.0))
    products = r @ r.t()
    gram = (features @ features.t()).add_(1.0).mul_(products)
    inner = gram.mean(1)
    return loss, products.diagonal(), logits.argmax(1) == target, gram, inner, inner.mean()


def _scoring_case(n: int, classes: int, features: int) -> Case:
    return Case(
        f"statistics, residual, gram and mean gradient n={n} C={classes} d={features} float32",
        partial(_scoring_inputs, n, classes, features),
        {"ours": _scoring, "eager torch, inner products from the Gram matrix": _eager_scoring},
        flops=n * (n + 1) * (classes + features) + 4 * n * classes * features,
        nbytes=4 * (n * (classes + features) + n * n),
        formula="one triangle of both products and the mean's two; logits and features read and K written once",
        limits={"eager torch, inner products from the Gram matrix": 0.6},
        quick=True,
    )


CASES = [
    _case(128, 10, 128, quick=True),
    _case(512, 100, 512, quick=True),
    _case(1024, 100, 512, quick=True),
    _case(1024, 1000, 512),
    _case(1024, 10, 512),
    _case(2048, 1000, 2048),
    _case(4096, 1000, 768),
    _case(1024, 1000, 512, torch.bfloat16),
    _case(1024, 1000, 512, torch.float64),
    _mean_case(128, 10, 128, quick=True),
    _mean_case(128, 10, 512, quick=True),
    _mean_case(1024, 100, 512, quick=True),
    _mean_case(1024, 1000, 2048),
    _scoring_case(512, 100, 512),
    _residual_case(128, 10, 128, 32, quick=True),
    _residual_case(128, 10, 512, 32, quick=True),
    _residual_case(1024, 1000, 512, 256),
]
test_gram = suite(CASES)
