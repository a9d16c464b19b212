"""What is not supported says so at once."""

from __future__ import annotations

import sys
import types
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import selbp

INDEX = torch.tensor([0, 2])


def losses() -> tuple[nn.Linear, Tensor]:
    model = nn.Linear(3, 1)
    return model, model(torch.randn(4, 3)).square().sum(1)


def test_create_graph() -> None:
    model, values = losses()
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(selbp.select(values, INDEX).sum(), model.weight, create_graph=True)


def test_functional_transforms() -> None:
    model, _ = losses()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return selbp.select((x @ weight.t()).square().sum(1), INDEX).sum()

    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.grad(loss)(model.weight, torch.randn(4, 3))
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.vmap(loss, in_dims=(None, 0))(model.weight, torch.randn(2, 4, 3))


def test_compiled_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch._dynamo.compiled_autograd")
    module.compiled_autograd_enabled = True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch._dynamo.compiled_autograd", module)
    _, values = losses()
    with pytest.raises(NotImplementedError, match="compiled autograd"):
        selbp.select(values, INDEX).sum().backward()


@pytest.mark.parametrize(
    ("indices", "error", "words"),
    [
        ([0, 1], TypeError, "int64 tensor, got list"),
        (torch.tensor([0.0]), TypeError, "float32"),
        (torch.tensor([True, False, True, True]), TypeError, "bool"),
        (torch.tensor([[0]]), ValueError, r"\(1, 1\)"),
        (torch.tensor(0), ValueError, r"\(\)"),
        (torch.tensor([4]), (IndexError, RuntimeError), "range"),
        (torch.tensor([-1]), (IndexError, RuntimeError), "range"),
    ],
)
def test_indices(indices: object, error: type[Exception], words: str) -> None:
    _, values = losses()
    with pytest.raises(error, match=words):
        selbp.select(values, indices)  # type: ignore[arg-type]


def test_losses() -> None:
    _, values = losses()
    with pytest.raises(ValueError, match='reduction="none"'):
        selbp.select(values.mean(), INDEX)
    with pytest.raises(ValueError, match="agree"):
        selbp.select((values, values[:3]), INDEX)
    with pytest.raises(ValueError, match='"exact" or "subset"'):
        selbp.select(values, INDEX, batchnorm="frozen")


def test_without_gradients_it_is_index_select() -> None:
    _, values = losses()
    with torch.no_grad():
        assert torch.equal(selbp.select(values, INDEX), values[INDEX])
    assert not selbp.select(values.detach(), INDEX).requires_grad


def test_the_former_names_of_options_are_taken() -> None:
    """``dense`` counts as ``densified`` does, and ``live`` keeps NaN out as ``any_valid`` does."""
    model, counts = nn.Linear(3, 1), Counter[str]()
    hidden = model(torch.full((4, 3), torch.nan))
    selbp.select(hidden, INDEX, live=torch.tensor(False)).backward(torch.zeros(2, 1), retain_graph=True)
    assert not model.weight.grad.any()
    selbp.select(hidden.sort(0).values, INDEX, dense=counts).sum().backward()
    assert counts
    given = {"dense": counts, "densified": counts, "live": torch.tensor(True), "any_valid": torch.tensor(True)}
    for former, name in (("dense", "densified"), ("live", "any_valid")):
        with pytest.raises(TypeError, match=f"{name} or its former name {former}, got both"):
            selbp.select(hidden, INDEX, **{former: given[former], name: given[name]})
