"""Whole models: exact to rounding, on k rows throughout except where BatchNorm couples the samples."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import selbp
from selbp_study.row_models import SMALL

F64 = torch.float64
SELECTIONS = {
    "three": [0, 3, 7],
    "unsorted": [6, 1, 4],
    "twice": [5, 5, 2],
    "one": [3],
    "all": list(range(8)),
    "none": [],
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    task = SMALL[name]
    model = task.build().to(F64)
    inputs, target = task.batch(task.n)
    return model, inputs.to(F64) if inputs.is_floating_point() else inputs, target


def gradients(
    name: str, index: Tensor, *, rows: bool, dense: Counter[str] | None = None, **options: str
) -> list[Tensor]:
    model, inputs, target = build(name)
    torch.manual_seed(1)
    losses = SMALL[name].losses(model(inputs), target)
    chosen = selbp.select(losses, index, densified=dense, **options) if rows else losses[index]
    (chosen * torch.arange(1, len(index) + 1)).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("which", SELECTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_model_is_exact(name: str, which: str) -> None:
    index, dense = torch.tensor(SELECTIONS[which], dtype=torch.int64), Counter()
    for got, want in zip(
        gradients(name, index, rows=True, dense=dense), gradients(name, index, rows=False), strict=True
    ):
        assert type(got) is Tensor
        assert float((got - want).norm()) <= 1e-11 * (1 + float(want.norm()))
    assert set(dense) == ({"aten.native_batch_norm_backward.default"} if name == "ResNet-BN" else set())


def test_batchnorm_subset_runs_on_the_chosen_rows() -> None:
    dense: Counter[str] = Counter()
    index = torch.arange(6)
    got = gradients("ResNet-BN", index, rows=True, dense=dense, batchnorm="subset")
    want = gradients("ResNet-BN", index, rows=False)
    assert not dense
    cosine = sum(float((a * b).sum()) for a, b in zip(got, want, strict=True))
    cosine /= sum(float((a * a).sum()) for a in got) ** 0.5 * sum(float((b * b).sum()) for b in want) ** 0.5
    assert 0.8 < cosine < 0.99999  # an approximation, and not the exact gradient


def test_batchnorm_subset_with_every_row_is_exact() -> None:
    index = torch.arange(8)
    got = gradients("ResNet-BN", index, rows=True, batchnorm="subset")
    for a, b in zip(got, gradients("ResNet-BN", index, rows=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_running_statistics_are_updated_once() -> None:
    model, inputs, target = build("ResNet-BN")
    losses = SMALL["ResNet-BN"].losses(model(inputs), target)
    before = [buffer.clone() for buffer in model.buffers()]
    selbp.select(losses, torch.tensor([1, 2]), batchnorm="subset").sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
