"""The backward that is written by hand gives the gradients of ours: its time is one of the same task."""

import pytest
import torch
from torch.nn import functional

import selbp
from benchmarks.tools import rows_by_hand
from selbp_study.row_models import TIMED


@pytest.mark.parametrize("name", rows_by_hand.MODELS)
def test_it_has_the_gradients_of_rows(name):
    torch.manual_seed(0)
    task = TIMED[name]
    model, (x, y), chosen = task.build().double(), task.batch(8), torch.tensor([1, 5, 6])
    x = x.double()
    selbp.select(functional.cross_entropy(model(x), y, reduction="none"), chosen).mean().backward()
    wanted = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    rows_by_hand.by_hand(model, x, y, chosen)
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-10, atol=1e-14)


def test_the_table_has_a_line_for_each_model(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(selbp, "keep_freed_memory", lambda: None)
    lines = rows_by_hand.table(rounds=1).splitlines()
    assert [line.split()[1] for line in lines[2:]] == list(rows_by_hand.MODELS)
