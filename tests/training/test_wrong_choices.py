"""What a rule, a batch or an option of one's own gets wrong at first, and what the error says of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import selbp

N, K = 16, 4
INPUTS, TARGET = torch.ones(N, 5), torch.arange(N) % 3


class Rule(selbp.BaseSelector):
    """Returns what it was given."""

    needs = "gradients"

    def __init__(self, made: object) -> None:
        self.made = made

    def choose(self, rows: object, k: int) -> selbp.Selection:
        return self.made  # type: ignore[return-value]


def chosen(*rows: int) -> selbp.Selection:
    return selbp.Selection(torch.tensor(rows), torch.ones(len(rows)) / K)


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (torch.arange(K), TypeError, r"must return a selbp.Selection of two tensors, indices and weights, got"),
        (([0, 1, 2, 3], [0.25] * K), TypeError, r"must return a selbp.Selection of two tensors"),
        (chosen(0, 1, 2), ValueError, r"indices \(k = 4,\) int64 .* got torch.int64 \(3,\)"),
        (chosen(0, 1, 2, 3, 4), ValueError, r"indices \(k = 4,\) int64 .* got torch.int64 \(5,\)"),
        (chosen(0, 1, 2, -1), ValueError, r"rows in \[0, n = 16\), got values from -1 to 2"),
        (chosen(0, 1, 2, N), ValueError, r"rows in \[0, n = 16\), got values from 0 to 16"),
    ],
    ids=["indices", "lists", "few", "many", "minus", "beyond"],
)
@pytest.mark.parametrize("cut", [None, "0"], ids=["step", "cut"])
def test_a_rule_must_choose_k_rows(made: object, error: type[Exception], said: str, cut: str | None) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    step = selbp.SelectiveBackprop(model, selector=Rule(made), keep=K, cut=cut)
    with pytest.raises(error, match=said):
        step(INPUTS, TARGET).backward()


def test_a_rule_must_say_what_it_reads() -> None:
    rule = Rule(None)
    rule.needs = "losses"
    with pytest.raises(TypeError, match=r"must say what it reads, needs = one of \('nothing', .* with 'losses'"):
        selbp.SelectiveBackprop(nn.Linear(5, 3), selector=rule, keep=K)


def test_what_the_caller_must_know_is_asked_for_by_its_name() -> None:
    step = selbp.SelectiveBackprop(nn.Linear(5, 3), selector=selbp.ReducibleLoss(), keep=K)
    said = r"extras must hold 'irreducible_loss', .*, got none: pass it as step\(x, y, irreducible_loss=...\)"
    with pytest.raises(ValueError, match=said):
        step(INPUTS, TARGET)


@pytest.mark.parametrize(
    ("batch", "name"), [({"x": INPUTS, "table": torch.ones(5)}, "'table'"), ((INPUTS, torch.ones(5)), "1")]
)
def test_an_entry_without_samples_is_named(batch: object, name: str) -> None:
    step = selbp.SelectiveBackprop(nn.Linear(5, 3), selector=selbp.TopLoss(), keep=K)
    said = rf"n = 16 rows, got one of \(5,\), {name}: where it holds no samples pass shared=\({name},\), .* batch_dims="
    with pytest.raises(ValueError, match=said):
        step(batch, TARGET)


def test_a_target_by_another_name_may_be_named() -> None:
    step = selbp.SelectiveBackprop(nn.Linear(5, 3), selector=selbp.TopLoss(), keep=K)
    with pytest.raises(ValueError, match=r"target is missing: .* target_keys=\(name,\)"):
        step({"input": INPUTS, "label": TARGET})


def test_auto_select_says_how_many_rows_by_k_alone() -> None:
    data = TensorDataset(INPUTS, TARGET)
    with pytest.raises(ValueError, match=r"keep must come with a selector=.* k= says how many"):
        selbp.auto_select(nn.Linear(5, 3), data, classes=3, k=K, pool=8, keep=0.25)
    auto = selbp.auto_select(nn.Linear(5, 3), data, classes=3, k=K, pool=8, prices={"random": 1.0, "drawn": 1.5})
    assert auto.state_dict()["current"] == "random" and auto.step.table is auto.table


@pytest.mark.parametrize("labels", [["cat", "dog"] * 8, list(torch.eye(2).repeat(8, 1))], ids=["names", "one-hot"])
def test_labels_of_a_data_set_must_be_classes(labels: list[object]) -> None:
    data = [(torch.ones(5), label) for label in labels]
    with pytest.raises(ValueError, match=r"a proxy needs one class a sample, an integer: the labels are "):
        selbp.auto_select(nn.Linear(5, 2), data, classes=2, k=K, pool=8)
