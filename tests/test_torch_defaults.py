"""A user may set a default device and a default type: what the package makes is where it says, and what it says."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.operator_calls import RIGHT
from support.sampling_kit import data, known_table, model
from support.training_kit import mlp, samples
from torch.utils import _pytree as pytree

import selbp
from selbp.sampling import ScoredBatchSampler, features, fit_proxy

PACKAGE = Path(selbp.__file__).parent
# torch's functions that make a tensor on the default device. The others take the device of a tensor or of a generator.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("zeros", "hann_window", "sparse_coo_tensor"),
}
# Those that make a tensor of the default type whatever they are given.
FLOATING = {"empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace", "normal", "ones"}
FLOATING |= {"rand", "randn", "scalar_tensor", "zeros"}


def without(argument: str, functions: set[str], source: str) -> list[int]:
    """The lines on which ``torch.<function>`` is called without ``argument=``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in functions
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and argument not in {keyword.arg for keyword in node.keywords}
    ]


@pytest.mark.parametrize(("argument", "functions"), [("device", FACTORIES), ("dtype", FLOATING)])
def test_every_tensor_that_is_made_names(argument: str, functions: set[str]) -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in without(argument, functions, path.read_text())
    }
    assert not found


def operator(name: str) -> Callable[[], Any]:
    return lambda: getattr(torch.ops.selbp, name)(*RIGHT[name].values())


def trained(cut: bool, selector: Any, **options: Any) -> Callable[[], Any]:
    """The parameters after three steps, or after three backwards through a cut."""
    torch.manual_seed(0)
    start, batches = mlp(), [samples() for _ in range(3)]

    def run() -> Any:
        model = copy.deepcopy(start)  # torch makes the parameters of a module as the defaults say
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if cut:
            hook = selbp.BackwardCut(8, selector=copy.deepcopy(selector))
            model[1].register_forward_hook(lambda module, args, out: hook(out))
        rule = copy.deepcopy(selector)  # some have a memory
        step = None if cut else selbp.SelectiveBackprop(model, keep=8, selector=rule, **options)
        for x, y in batches:
            loss = torch.nn.functional.cross_entropy(model(x), y) if step is None else step(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.state_dict().values())

    return run


def sampled() -> Any:
    sampler = ScoredBatchSampler(copy.deepcopy(TABLE), k=4, pool=16, seed=0)
    return [torch.as_tensor([int(i) for i in batch], device="cpu") for batch, _ in zip(sampler, range(4), strict=False)]


def fitted(workers: int) -> Callable[[], Any]:
    def run() -> Any:
        table = selbp.sampling.ScoreTable(200, 4, noise="class")
        fit_proxy(DATA, table, passes=2, workers=workers)
        return [value for value in table.state_dict().values() if isinstance(value, torch.Tensor)]

    return run


def automatic(noise: str, dataset: Any) -> Callable[[], Any]:
    """What ``auto_select`` trains in eight steps, and its table."""
    start = model().to(dataset.tensors[0].dtype)

    def run() -> Any:
        trained = copy.deepcopy(start)
        auto = selbp.auto_select(trained, dataset, classes=4, k=8, pool=24, noise=noise)
        for ids in auto.sampler:
            auto(dataset.tensors[0][ids], dataset.tensors[1][ids]).backward()
        gradients = [p.grad for p in trained.parameters()]
        return [*gradients, [x for x in auto.sampler.table.state_dict().values() if isinstance(x, torch.Tensor)]]

    return run


def hashed() -> Any:
    return features.automatic(["one text", "and another"])


def losses_of_each(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output, target, reduction="none")


DATA, TABLE = data(), known_table()
DOUBLE = torch.utils.data.TensorDataset(DATA.tensors[0].double(), DATA.tensors[1])
CALLS: dict[str, Callable[[], Any]] = {
    **{f"ops.{name}": operator(name) for name in RIGHT},
    "signs": lambda: selbp.ops.sketch_projections(10, 5, (4, 4)),
    "gaussian": lambda: selbp.ops.sketch_projections(10, 5, (4, 4), kind="gaussian"),
    "rows": trained(False, selector=selbp.GradientMatching(), backward="rows"),
    "recompute": trained(False, selector=selbp.LossPercentile(), backward="recompute"),
    "cut": trained(True, selector=selbp.CubeSampling()),
    "refit": trained(False, selector=selbp.TopLoss(weights="refit"), backward="rows"),
    "function": trained(False, selector=selbp.TopLoss(), loss=losses_of_each),
    "auto": automatic("auto", DATA),
    "auto of float64": automatic("class", DOUBLE),
    "texts": hashed,
    "sampler": sampled,
    "proxy": fitted(0),
    "proxy by a worker": fitted(1),
}


def called(name: str) -> list[Any]:
    torch.manual_seed(1)
    return pytree.tree_leaves(CALLS[name]())


def check_same(got: list[Any], want: list[Any]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_changes_nothing(name: str) -> None:
    """No tensor on the meta device has data, so that one among the others would be an error."""
    want = called(name)
    with torch.device("meta"):
        got = called(name)
    check_same(got, want)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_a_default_type_changes_nothing(name: str, dtype: torch.dtype) -> None:
    want, before = called(name), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        got = called(name)
    finally:
        torch.set_default_dtype(before)
    check_same(got, want)
