"""The recommended steps train: by a table; on the largest losses; with a cut, exact above it, some rows below."""

import pytest
import torch
from torch import nn

import selbp


def test_the_recommended_step_trains_on_the_largest_losses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))
    inputs, target = torch.randn(64, 12), torch.randint(0, 4, (64,))
    step = selbp.SelectiveBackprop(model, **selbp.recommended())
    step(inputs, target).backward()
    largest = nn.functional.cross_entropy(model(inputs), target, reduction="none").topk(16).indices
    assert sorted(step.report.selection.indices.tolist()) == sorted(largest.tolist())
    chosen = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs[largest]), target[largest]).backward()
    for mine, exact in zip(chosen, model.parameters(), strict=True):
        torch.testing.assert_close(mine, exact.grad)


def test_the_recommended_step_is_exact_above_its_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs, target = torch.randn(64, 12), torch.randint(0, 4, (64,))
    step = selbp.SelectiveBackprop(model, **selbp.recommended(cut="2"))
    step(inputs, target).backward()
    chosen = [parameter.grad.clone() for parameter in model.parameters()]
    assert step.report.k == 16
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), target).backward()
    full = [parameter.grad for parameter in model.parameters()]
    for mine, exact in zip(chosen[4:], full[4:], strict=True):
        torch.testing.assert_close(mine, exact)
    # Below it 16 rows stand for 64: near, not equal.
    for mine, exact in zip(chosen[:2], full[:2], strict=True):
        assert 2.0**-6 < float((mine - exact).norm() / exact.norm()) < 1.0


def test_with_a_data_set_the_whole_of_choosing_before_the_forward_is_recommended() -> None:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(300, 6), torch.randint(0, 3, (300,)))
    auto = selbp.recommended(nn.Linear(6, 3), data, classes=3, k=12, pool=40)
    assert isinstance(auto, selbp.AutoSelect)
    inputs, target = next(iter(torch.utils.data.DataLoader(data, batch_sampler=auto.sampler)))
    auto(inputs, target).backward()
    assert auto.report.k == 12


def test_what_goes_with_the_other_form_is_refused_and_a_lone_module_is_a_cut() -> None:
    data = torch.utils.data.TensorDataset(torch.randn(8, 6), torch.randint(0, 3, (8,)))
    with pytest.raises(TypeError, match="classes must come with a data set"):
        selbp.recommended(nn.Linear(6, 3), classes=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="cut goes with minibatches"):
        selbp.recommended(nn.Linear(6, 3), data, cut="0")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module"):
        selbp.recommended("body.9", data)  # type: ignore[call-overload]
    assert selbp.recommended("body.9")["cut"] == "body.9"
