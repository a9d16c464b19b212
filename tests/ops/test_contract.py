"""What holds of every operator, one by one: the table is ``support.contract``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contract import DRAWS_NO_TENSOR, SIZES, SPECS, Arguments, OperatorSpec
from support.operator_calls import ONLY_DIRECT, ONLY_VALUES, RIGHT, WRONG
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import jvp, vmap
from torch.utils._pytree import tree_leaves

from selbp import ops

ORDINARY, LARGE = (7, 5, 3), (33, 17, 65)
INNER = (  # no function of selbp.ops, with tests of their own
    "linear_cross_entropy_backward",
    "match_gradients",
    "match_small",
    "choose_by_norm",
    "choose_by_percentile",
    "score_minibatch",
    "finite_rows",
    "unscored",
    "count_hits",
    "weighted_loss",
    "choose_balanced",
    "choose_diverse",
)


def named(specs: Any) -> Any:
    return pytest.mark.parametrize("spec", specs, ids=[spec.name for spec in specs])


each = named(SPECS)
registered = named([spec for spec in SPECS if spec.registered])
constant = named([spec for spec in SPECS if not spec.differentiable])


def floating(a: Arguments) -> list[str]:
    return [name for name, x in a.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def same(ours: Any, expected: Any) -> bool:
    """Bit for bit; NaN equals NaN."""
    pairs = zip(tree_leaves(ours), tree_leaves(expected), strict=True)
    return all(a is b or torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in pairs)


# ---------------------------------------------------------------------------------------------------------- the table


def test_the_table_has_every_operator() -> None:
    public = {name for name in ops.__all__ if name[0].islower()}
    known = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("selbp::")}
    names = {spec.name for spec in SPECS}
    assert public - set(DRAWS_NO_TENSOR) <= names and known - set(INNER) == {s.name for s in SPECS if s.registered}
    assert {*WRONG, *ONLY_DIRECT, *ONLY_VALUES} <= RIGHT.keys() == known and all(WRONG[name] for name in known)


@registered
def test_an_example_stands_in_the_order_of_the_schema(spec: OperatorSpec) -> None:
    wanted = [argument.name for argument in spec.overload._schema.arguments]
    assert list(spec.example(*ORDINARY, spec.dtypes[0])) == wanted == list(spec.right)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("size", SIZES, ids=["none", "one", "no width", "ragged", "large"])
@pytest.mark.parametrize(
    ("spec", "dtype"), [pytest.param(s, dtype, id=f"{s.name}-{dtype}") for s in SPECS for dtype in s.dtypes]
)
def test_values_are_the_references(spec: OperatorSpec, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    a = spec.example(max(size[0], spec.least), *size[1:], dtype)
    spec.bound(a, spec(a))


@pytest.mark.parametrize(
    ("spec", "bug"), [pytest.param(s, bug, id=f"{s.name}-{name}") for s in SPECS for name, bug in s.mutants.items()]
)
def test_a_planted_bug_is_seen(spec: OperatorSpec, bug: Callable[[Arguments, Any], Any]) -> None:
    a = spec.example(*LARGE, torch.float32 if torch.float32 in spec.dtypes else torch.float64)
    outputs = spec(a)
    spec.bound(a, outputs)
    with pytest.raises(AssertionError):
        spec.bound(a, bug(a, outputs))


STRIDES = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x,
    "stepped": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "sliced": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]] if x.dim() else x,
    "offset": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    "expanded": lambda x: x[..., None].expand(*x.shape, 2)[..., 0],
    "negative": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
}


@pytest.mark.parametrize("change", STRIDES.values(), ids=STRIDES.keys())
@each
def test_any_strides(spec: OperatorSpec, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    a = spec.example(*LARGE, spec.dtypes[0])
    outputs = spec({name: change(x) if isinstance(x, torch.Tensor) else x for name, x in a.items()})
    if spec.strided:
        assert same(outputs, spec(a))
    else:  # torch's products take another path
        spec.bound(a, outputs)


# ------------------------------------------------------------------------------------- registration and compilation


@pytest.mark.parametrize("size", [(0, 3, 4), ORDINARY], ids=["none", "ragged"])
@registered
def test_opcheck(spec: OperatorSpec, size: tuple[int, int, int]) -> None:
    for dtype in spec.dtypes[::2] if size == ORDINARY else spec.dtypes[:1]:  # float32 and bfloat16
        a = spec.example(*size, dtype)
        if any(x.is_floating_point() and x.isnan().any() for x in tree_leaves(spec(a))):
            pytest.skip("needs an opcheck for which NaN equals NaN")  # the residual of no rows
        torch.library.opcheck(spec.overload, tuple(a.values()))
    if not spec.differentiable:  # what it returns carries no gradient, whatever its inputs want
        asked = {name: x.clone().requires_grad_() if name in floating(a) else x for name, x in a.items()}
        torch.library.opcheck(spec.overload, tuple(asked.values()))


@pytest.mark.parametrize("name", INNER)
def test_opcheck_of_what_is_no_function(name: str) -> None:
    overload, arguments = getattr(torch.ops.selbp, name).default, tuple(RIGHT[name].values())
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "unscored":  # whose NaN equals no NaN there
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(overload, arguments, test_utils=checks)


def call_all(everything: list[Arguments]) -> list[Any]:
    return [spec(a) for spec, a in zip(SPECS, everything, strict=True)]


@pytest.fixture
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def of_each(n: int, classes: int = 5, d: int = 3) -> list[Arguments]:
    return [spec.example(n, classes, d, spec.dtypes[0]) for spec in SPECS]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_all_compile_to_one_graph(backend: str, fresh: None) -> None:
    everything = of_each(7)
    compiled = torch.compile(call_all, backend=backend, fullgraph=True)
    for spec, ours, expected in zip(SPECS, compiled(everything), call_all(everything), strict=True):
        assert same(ours, expected), spec.name


def check_compiled_once(call: Callable[..., Any], examples: list[Any]) -> None:
    """An integer such as k becomes a symbol at its second value; after that nothing is new."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for example in examples:
        assert same(compiled(example), call(example))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]


CHANGING = (30, 40, 50)  # rows, of 13 classes and 17 features: torch would take two equal sizes for one


def test_sizes_that_change_compile_no_more(fresh: None) -> None:
    check_compiled_once(call_all, [of_each(n, 13, 17) for n in CHANGING])


@pytest.mark.slow
@each
def test_sizes_that_change_compile_it_no_more(spec: OperatorSpec, fresh: None) -> None:
    check_compiled_once(spec, [spec.example(n, 13, 17, spec.dtypes[0]) for n in CHANGING])


# ---------------------------------------------------------------------------------------------------- derivatives


@constant
def test_what_carries_no_gradient_is_constant_in_either_mode(spec: OperatorSpec) -> None:
    a = spec.example(*ORDINARY, spec.dtypes[0])
    names = floating(a)
    asked = spec({**a, **{name: a[name].clone().requires_grad_() for name in names}})
    assert not any(x.requires_grad for x in tree_leaves(asked) if isinstance(x, torch.Tensor))

    def of(*values: torch.Tensor) -> Any:
        return spec({**a, **dict(zip(names, values, strict=True))})

    values = tuple(a[name] for name in names)
    outputs, tangents = jvp(of, values, tuple(map(torch.ones_like, values)))
    assert same(outputs, spec(a))
    assert not any(x.any() for x in tree_leaves(tangents) if isinstance(x, torch.Tensor))


@named([spec for spec in SPECS if spec.differentiable])
def test_gradients(spec: OperatorSpec) -> None:
    a = spec.example(*ORDINARY, torch.float64) | {"rows": None}  # a row that is not among them has a loss alone

    def of(*values: torch.Tensor) -> Any:
        return spec({**a, **dict(zip(spec.differentiable, values, strict=True))})[0]

    leaves = [a[name].clone().requires_grad_() for name in spec.differentiable]
    assert torch.autograd.gradcheck(of, leaves, check_forward_ad=True)
    assert not any(x.requires_grad for x in spec({**a, **dict(zip(spec.differentiable, leaves, strict=True))})[1])


@each
def test_vmap_is_one_by_one(spec: OperatorSpec) -> None:
    examples = [spec.example(*ORDINARY, spec.dtypes[0]) for _ in range(3)]
    names = floating(examples[0])

    def of(*values: torch.Tensor) -> Any:
        return spec({**examples[0], **dict(zip(names, values, strict=True))})

    batches = [torch.stack([a[name] for a in examples]) for name in names]
    together = vmap(of)(*batches)
    for i in range(3):
        one = of(*(batch[i] for batch in batches))
        assert same([x[i] for x in tree_leaves(together)], tree_leaves(one))
