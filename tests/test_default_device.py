"""A user may set a default device: what the package makes is where it says, not where that is."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.operator_calls import RIGHT
from support.sampling_kit import data, known_table
from support.training_kit import mlp, samples
from torch.utils import _pytree as pytree

import selbp
from selbp.sampling import ScoredBatchSampler, fit_proxy

PACKAGE = Path(selbp.__file__).parent
# torch's functions that make a tensor on the default device. The others take the device of a tensor or of a generator.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"),
    *("zeros", "hann_window", "sparse_coo_tensor"),
}


def without_device(source: str) -> list[int]:
    """The lines on which ``torch.<factory>`` is called without ``device=``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in FACTORIES
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and "device" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_tensor_that_is_made_names_its_device() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in without_device(path.read_text())
    }
    assert not found


def operator(name: str) -> Callable[[], Any]:
    return lambda: getattr(torch.ops.selbp, name)(*RIGHT[name].values())


def trained(cut: bool, selector: Any, **options: Any) -> Callable[[], Any]:
    """The parameters after three steps, or after three backwards through a cut."""
    torch.manual_seed(0)
    start, batches = mlp().state_dict(), [samples() for _ in range(3)]

    def run() -> Any:
        with torch.device("cpu"):  # torch makes the parameters of a module where the default says
            model = mlp()
        model.load_state_dict(start)
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


def fitted() -> Any:
    table = selbp.sampling.ScoreTable(200, 4, noise="class")
    fit_proxy(DATA, table, passes=2)
    return [value for value in table.state_dict().values() if isinstance(value, torch.Tensor)]


DATA, TABLE = data(), known_table()
CALLS: dict[str, Callable[[], Any]] = {
    **{f"ops.{name}": operator(name) for name in RIGHT},
    "signs": lambda: selbp.ops.sketch_projections(10, 5, (4, 4)),
    "gaussian": lambda: selbp.ops.sketch_projections(10, 5, (4, 4), kind="gaussian"),
    "rows": trained(False, selector=selbp.GradientMatching(), backward="rows"),
    "recompute": trained(False, selector=selbp.LossPercentile(), backward="recompute"),
    "cut": trained(True, selector=selbp.CubeSampling()),
    "sampler": sampled,
    "proxy": fitted,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_default_device_changes_nothing(name: str) -> None:
    """No tensor on the meta device has data, so that one among the others would be an error."""

    def run() -> list[Any]:
        torch.manual_seed(1)
        return pytree.tree_leaves(CALLS[name]())

    want = run()
    with torch.device("meta"):
        got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
