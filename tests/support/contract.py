"""One table of all operators: what each is given, what it must return, and what else holds of it.

``tests/ops/test_contract.py`` holds every operator to it. A new operator adds a line to ``SPECS``, its right and wrong
calls to ``operator_calls`` and its bound to ``bounds``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from selbp import ops
from selbp.reference.sampling import inclusion_probabilities
from support import bounds
from support.operator_calls import RIGHT, WRONG, through_the_function

Arguments = dict[str, Any]
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DOUBLE = (torch.float64,)
# (rows, classes, width): nothing at all, one of each, no width, ragged, more terms than a vector register holds.
SIZES = ((0, 3, 4), (1, 1, 1), (2, 3, 0), (7, 5, 3), (33, 17, 65))


@dataclass(frozen=True)
class OperatorSpec:
    """One operator.

    ``example(n, classes, d, dtype)`` gives arguments by name, in the order of the schema; ``bound(arguments, outputs)``
    raises where the outputs are not what the reference gives in float64, within the error of the arithmetic.
    """

    name: str
    example: Callable[[int, int, int, torch.dtype], Arguments]
    bound: Callable[[Arguments, Any], object]
    call: Callable[..., Any] | None = None  # of the arguments by name; None: of torch.ops.selbp by position
    dtypes: tuple[torch.dtype, ...] = FLOATING
    registered: bool = True  # as torch.ops.selbp.<name>
    differentiable: tuple[str, ...] = ()  # arguments that a gradient reaches; through the others none does
    least: int = 0  # rows
    strided: bool = True  # the same bits whatever the strides; else within the bound
    mutants: dict[str, Callable[[Arguments, Any], Any]] = field(default_factory=dict)  # outputs of a planted bug

    def __call__(self, arguments: Arguments) -> Any:
        """What the operator returns."""
        if self.call is None:
            return getattr(torch.ops.selbp, self.name)(*arguments.values())
        return self.call(**arguments)

    @property
    def overload(self) -> Any:
        """``torch.ops.selbp.<name>``."""
        return getattr(torch.ops.selbp, self.name).default

    @property
    def wrong(self) -> list[tuple[Arguments, str]]:
        """Changes of the right call, and the words of the error; ``tests/wrong_calls`` makes each of them."""
        return WRONG.get(self.name, [])

    @property
    def right(self) -> Arguments:
        """The right call that they change."""
        return RIGHT[self.name]


# ------------------------------------------------------------------------------------------------------- examples


def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def loss(n: int, classes: int, dtype: torch.dtype) -> Arguments:
    """Target, one row of it ignored, and options that reach every branch."""
    target = torch.randint(classes, (n,))
    target[1:2] = -100
    weight = torch.rand(classes).to(dtype) + 0.1
    options = {"class_weight": weight, "ignore_index": -100, "label_smoothing": 0.1, "softcap": 5.0}
    return {"target": target, **options}


def logits(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    a = loss(n, classes, dtype)
    z, features = normal(n, classes, dtype=dtype), normal(n, d, dtype=dtype)
    return {"logits": z, "target": a.pop("target"), "features": features, **a, "bias": True}


def head(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    tensors = {name: normal(*shape, dtype=dtype) for name, shape in (("features", (n, d)), ("weight", (classes, d)))}
    return {**tensors, "bias": normal(classes, dtype=dtype), **loss(n, classes, dtype)}


def head_of_rows(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    a = head(n, classes, d, dtype)
    first = {name: a.pop(name) for name in ("features", "weight", "bias", "target", "class_weight")}
    return {**first, "rows": torch.arange(0, n, 2), **a, "keep_logits": True, "skip_mass": 0.1}


def stored(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    a = logits(n, classes, d, dtype)
    target, z, _, _ = (a.pop(name) for name in ("target", "logits", "features", "bias"))
    return {"logits": z, "target": target, "lse": ops.cross_entropy_statistics(z, target, **a).lse, **a}


def factors(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    return {"residual": normal(n, classes, dtype=dtype), "features": normal(n, d, dtype=dtype), "bias": True}


def chosen(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    k = (n + 2) // 3
    a = {**factors(n, classes, d, dtype), "indices": torch.randperm(n)[:k], "weights": torch.rand(k)}
    return {name: a[name] for name in ("residual", "features", "indices", "weights", "bias")}


def gram(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    rows = torch.randn(n, classes + d, dtype=torch.float64) + 0.3
    mean = rows.mean(0) if n else rows.sum(0)
    found = {"gram": rows @ rows.T, "inner": rows @ mean, "target_sq": mean.square().sum()}
    return {name: x.to(dtype) for name, x in found.items()}


def matched(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    options = {"k": (n + 1) // 2, "rule": "ols", "ridge": 1e-3, "nonnegative": True}
    return {**gram(n, classes, d, dtype), **options, "valid": torch.arange(n) % 5 != 1, "tolerance": 0.0}


def squares(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    return {"a": normal(n, classes, dtype=dtype), "b": normal(n, dtype=dtype), "ridge": 0.01}


def squares_gram(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    a = gram(n, classes, d, dtype)
    return {"gram": a["gram"], "inner": a["inner"], "valid": torch.arange(n) % 5 != 1, "ridge": 0.0}


def sequences(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    length = 3
    a = head(n * length, classes, d, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    left, right = ops.sketch_projections(classes, d + 1, (2, 3), dtype=compute)
    a["features"], target = a["features"].view(n, length, d), a.pop("target").view(n, length)
    first = {name: a.pop(name) for name in ("features", "weight", "bias")}
    return {**first, "target": target, "left": left, "right": right, **a}


def sketches(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    return {"sketches": normal(n, classes, d, dtype=dtype)}


def balanced(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    odds = torch.rand(n, dtype=dtype) + 0.05
    probability = inclusion_probabilities(odds, (n + 1) // 3) if n else odds
    order, draws = torch.randperm(n), torch.rand(n, dtype=dtype)
    return {"balance": normal(n, d, dtype=dtype), "probability": probability, "order": order, "draws": draws}


def scored(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    score, draws = torch.rand(n, dtype=dtype).exp(), torch.rand(n + 1, dtype=dtype)
    options = {"k": (n + 1) // 2, "rule": "odds", "weights": "unbiased", "single": False}
    return {"score": score, "valid": torch.arange(n) % 5 != 1, "draws": draws, **options}


def history(n: int, classes: int, d: int, dtype: torch.dtype) -> Arguments:
    return {"history": normal(classes, dtype=dtype), "loss": normal(n, dtype=dtype)}


# ---------------------------------------------------------------------------------------------------------- table


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments, Any], Any]:
    """A bug in one field of the outputs."""
    return lambda _, outputs: outputs._replace(**{name: change(getattr(outputs, name))})


def again(call: Callable[..., Any], **changes: Callable[[Arguments], Any]) -> Callable[[Arguments, Any], Any]:
    """A bug in how an argument is read."""
    return lambda a, _: call(**{**a, **{name: change(a) for name, change in changes.items()}})


def without(x: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    x = x.clone()
    x[rows, columns] = 0
    return x


def selected(residual: Any, features: Any, indices: Any, weights: Any, bias: bool) -> Any:
    return ops.matching_residual(residual, features, ops.Selection(indices, weights), bias=bias)


def sketched(left: Any, right: Any, **arguments: Any) -> Any:
    return ops.sketch(projections=(left, right), **arguments)


def with_statistics(keep_logits: bool, **arguments: Any) -> Any:  # the function keeps them where it has room
    return ops.linear_cross_entropy(return_statistics=True, **arguments)


STATISTICS = {
    "loss off by a percent": changed("loss", lambda x: x * 1.01),
    "norm off by five": changed("residual_sq", lambda x: x * 1.05),
    "no column of the bias": changed("feature_sq", lambda x: x - 1),
    "mask off by one": changed("valid", lambda x: x.roll(1)),
    "rounded to bfloat16": changed("lse", lambda x: x.bfloat16().float()),
}
SPECS = (
    OperatorSpec(
        "cross_entropy_statistics",
        logits,
        bounds.cross_entropy_statistics,
        ops.cross_entropy_statistics,
        mutants={
            **STATISTICS,
            "smoothing ignored": again(ops.cross_entropy_statistics, label_smoothing=lambda a: 0.0),
            "class weights ignored": again(ops.cross_entropy_statistics, class_weight=lambda a: None),
        },
    ),
    OperatorSpec(
        "linear_cross_entropy_statistics",
        head,
        bounds.linear_cross_entropy_statistics,
        ops.linear_cross_entropy_statistics,
        strided=False,
        mutants={
            **STATISTICS,
            "softcap ignored": again(ops.linear_cross_entropy_statistics, softcap=lambda a: 0.0),
            "bias ignored": again(ops.linear_cross_entropy_statistics, bias=lambda a: 0 * a["bias"]),
        },
    ),
    OperatorSpec(
        "linear_cross_entropy",
        head_of_rows,
        bounds.linear_cross_entropy,
        with_statistics,
        differentiable=("features", "weight", "bias"),
        strided=False,
        mutants={
            "bias ignored": again(with_statistics, bias=lambda a: 0 * a["bias"]),
            "loss in bfloat16": lambda a, found: (found[0].bfloat16().float(), found[1]),
        },
    ),
    OperatorSpec(
        "residual",
        stored,
        bounds.residual,
        ops.residual,
        mutants={
            "smoothing ignored": again(ops.residual, label_smoothing=lambda a: 0.0),
            "softcap ignored": again(ops.residual, softcap=lambda a: 0.0),
            "an ignored row": lambda a, r: r.index_fill(0, torch.tensor([1]), 1e-3),
            "bfloat16": lambda a, r: r.bfloat16().float(),
        },
    ),
    OperatorSpec(
        "gradient_gram",
        factors,
        bounds.gradient_gram,
        ops.gradient_gram,
        mutants={
            "no bias": again(ops.gradient_gram, bias=lambda a: False),
            "bias twice": lambda a, k: k + a["residual"].float() @ a["residual"].float().T,
            "no mirror": lambda a, k: k.tril(),
            "a block missing": lambda a, k: without(k, slice(0, 16), slice(16, 32)),
            "last row": lambda a, k: without(k, slice(-1, None), slice(0, 1)),
            "bfloat16": lambda a, k: k.bfloat16().float(),
            "not symmetric": lambda a, k: k * torch.ones(len(k)).index_fill_(0, torch.tensor([7]), 1 + 2e-7),
        },
    ),
    OperatorSpec(
        "mean_gradient",
        factors,
        bounds.mean_gradient,
        ops.mean_gradient,
        mutants={
            "sum for mean": lambda a, m: m._replace(head_weight=m.head_weight * len(a["residual"])),
            "no bias in inner": changed("inner", lambda x: x * (1 + 1e-3)),
            "target off by half a bfloat16": changed("target_sq", lambda x: x * (1 + 2**-9)),
            "a class lost": changed("head_weight", lambda x: x.index_fill(0, torch.tensor([3]), 0)),
            "bias dropped": changed("head_bias", torch.zeros_like),
        },
    ),
    OperatorSpec(
        "matching_residual",
        chosen,
        bounds.matching_residual,
        selected,
        mutants={
            "weights ignored": again(selected, weights=lambda a: 0 * a["weights"]),
            "no bias": again(selected, bias=lambda a: False),
            "shifted rows": again(selected, indices=lambda a: (a["indices"] + 1) % len(a["residual"])),
            "float32": lambda a, x: x.float().double(),
        },
    ),
    OperatorSpec(
        "match",
        matched,
        bounds.match,
        ops.match,
        mutants={
            "a row twice": changed("indices", lambda x: x[:1].expand(len(x))),
            "a row that is not valid": changed("indices", lambda x: x.index_fill(0, torch.tensor([0]), 1)),
            "negative weights": changed("weights", torch.neg),
            "one row fewer": changed("count", lambda x: x - 1),
        },
    ),
    OperatorSpec(
        "nnls",
        squares,
        bounds.nnls,
        ops.nnls,
        registered=False,
        mutants={
            "no ridge": lambda a, x: ops.nnls(a["a"], a["b"]),
            "a row too little": lambda a, x: 0.99 * x,
            "clipped least squares": lambda a, x: torch.linalg.lstsq(a["a"], a["b"]).solution.clamp(min=0),
        },
    ),
    OperatorSpec(
        "nnls_gram",
        squares_gram,
        bounds.nnls_gram,
        ops.nnls_gram,
        registered=False,
        mutants={"mask ignored": again(ops.nnls_gram, valid=lambda a: None), "a row too little": lambda a, x: 0.99 * x},
    ),
    OperatorSpec(
        "sketch",
        sequences,
        bounds.sketch,
        sketched,
        strided=False,
        mutants={
            "bias ignored": again(sketched, bias=lambda a: 0 * a["bias"]),
            "half": lambda a, x: x / 2,
            "the other sequence": lambda a, x: x.roll(1, 0),
        },
    ),
    OperatorSpec(
        "sketch_gram",
        sketches,
        bounds.sketch_gram,
        ops.sketch_gram,
        registered=False,
        strided=False,
        mutants={"bfloat16": lambda a, k: k.bfloat16().float(), "no mirror": lambda a, k: k.tril()},
    ),
    OperatorSpec(
        "cube_sample",
        balanced,
        bounds.cube_sample,
        dtypes=DOUBLE,
        mutants={"the complement": lambda a, x: ~x, "every unit": lambda a, x: torch.ones_like(x)},
    ),
    OperatorSpec(
        "choose_rows",
        scored,
        bounds.choose_rows,
        dtypes=DOUBLE,
        least=1,
        mutants={
            "weights of the mean": lambda a, x: (x[0], torch.full_like(x[1], 1 / len(x[1]))),
            "another order": lambda a, x: (x[0].flip(0), x[1]),
        },
    ),
    OperatorSpec(
        "percentile",
        history,
        bounds.percentile,
        dtypes=DOUBLE,
        mutants={"history forgotten": lambda a, x: (x[0].roll(1), x[1])},
    ),
)
DRAWS_NO_TENSOR = ("sketch_projections",)  # public, and no operator: it takes sizes and a seed
__all__ = ["DRAWS_NO_TENSOR", "SIZES", "SPECS", "OperatorSpec", "through_the_function"]
