"""What crosses the ranks is on the model's device: a group of NCCL's takes nothing else. Two processes over gloo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.elsewhere import THERE, Elsewhere, accelerator, moved
from support.processes import in_two_processes
from support.training_kit import mlp
from torch import nn

import selbp
from selbp.common.exchange import Ranks
from selbp.integrations.ranks import gathered, own
from selbp.sampling import ScoreTable


class Texts(nn.Module):
    """Vectors beside a list of texts, and of ragged tensors on the vectors' device."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 7).double(), nn.Linear(7, 5).double()

    def forward(self, x: torch.Tensor, texts: list[str], marks: list[torch.Tensor]) -> torch.Tensor:
        lengths = torch.tensor([float(len(text)) for text in texts], dtype=x.dtype, device=x.device)
        sums = torch.stack([mark.sum() for mark in marks])
        return self.head(torch.tanh(self.body(x * lengths[:, None]) + sums[:, None]))


class Tokens(nn.Module):
    """Token ids (n, T) to logits (n, T, 11)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8).double(), nn.Linear(8, 11).double()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids).cumsum(1).tanh())


def vectors(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    return mlp().double(), torch.randn(n, 12).double(), torch.randint(0, 5, (n,))


def texts(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    marks = [torch.randn(1 + i % 3).double() for i in range(n)]
    return Texts(), (torch.randn(n, 12).double(), ["a" * (i % 4) for i in range(n)], marks), torch.randint(0, 5, (n,))


def tokens(n: int) -> tuple[nn.Module, Any, torch.Tensor]:
    ids = torch.randint(0, 11, (n, n))  # as long as the rank has samples
    return Tokens(), {"input_ids": ids}, ids.clone()


ONE = {"scope": "global"}
CASES: dict[str, tuple[Callable[[int], Any], dict[str, Any]]] = {
    "losses": (vectors, {"selector": selbp.TopLoss(), **ONE}),
    "gradients": (vectors, {"selector": selbp.GradientMatching(), **ONE}),
    "draws": (vectors, {"selector": selbp.LossPercentile(), **ONE}),
    "unscored": (vectors, {"selector": selbp.Random(), **ONE}),
    "parts": (vectors, {"selector": selbp.GradientMatching(), "micro_batch": 3, **ONE}),
    "head": (vectors, {"selector": selbp.TopLoss(), "head_gradient": "full", **ONE}),
    "texts": (texts, {"selector": selbp.TopLoss(), **ONE}),
    "tokens": (tokens, {"selector": selbp.GradientMatching(), "loss": "causal_lm", **ONE}),
    "sketches": (tokens, {"selector": selbp.GradientMatching(), "loss": "causal_lm", "proxy": "sketch", **ONE}),
    "mean": (vectors, {"selector": selbp.GradientMatching(), "target": "global", "backward": "rows"}),
    "table": (vectors, {"selector": selbp.TopLoss(), **ONE}),
}


def gradients(name: str, rank: int, place: Callable[[Any], Any]) -> list[torch.Tensor]:
    """After two steps, with the figures that were reported."""
    make, options = CASES[name]
    torch.manual_seed(0)
    model, *_ = make(4)
    torch.manual_seed(1 + rank)
    _, inputs, target = make(9 - 3 * rank)
    table = ScoreTable(32, 5) if name == "table" else None
    step = selbp.SelectiveBackprop(place(model), keep=0.25, table=table, **copy.deepcopy(options))
    inputs, target = place((inputs, target))
    known = {} if table is None else {"ids": torch.arange(len(target)) + 16 * rank}
    for _ in range(2):
        step.backward(inputs, target, **known)
    seen = [step.report.selection.indices, step.report.selection.weights, *(p.grad for p in model.parameters())]
    learned = [] if table is None else [x for x in table.state_dict().values() if isinstance(x, torch.Tensor)]
    return [getattr(x, "held", x) for x in (*seen, *learned)]


def check_steps(rank: int) -> None:
    for name in CASES:
        want = gradients(name, rank, lambda value: value)
        with accelerator():
            found = gradients(name, rank, moved)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True, msg=f"{name} differs")


def check_words(rank: int) -> None:
    """Objects, numbers and errors."""
    with accelerator():
        ranks = Ranks(moved(nn.Linear(2, 2)))
        assert ranks.first({"rank": rank}) == {"rank": 0} and ranks.each_object(rank) == [0, 1]
        assert ranks.mean([float(rank)]) == [0.5]
        step = selbp.SelectiveBackprop(moved(mlp()), selector=selbp.TopLoss(), keep=0.5, scope="global")
        with pytest.raises(ValueError, match="on rank 0 and"):
            step(*moved((torch.randn(4, 12), torch.randint(0, 5, (4,)))) if rank else moved(vectors(4)[1:]))
        state = gathered({"memory": moved(torch.full((2,), float(rank)))})
        assert [part["memory"].tolist() for part in state["ranks"]] == [[0.0, 0.0], [1.0, 1.0]]
        assert own(state)["memory"].device.type == "cpu"  # else every process would open every other one's device
        with pytest.raises(RuntimeError, match="no backend for the device cpu"):
            dist.all_reduce(torch.ones(2))
        with pytest.raises(RuntimeError, match="on the same device"):
            Elsewhere(torch.ones(2)) + torch.ones(2)
        total = torch.tensor([rank + 1.0], device=THERE)
        dist.all_reduce(total)
        assert total.tolist() == [3.0]


def test_steps() -> None:
    in_two_processes(check_steps)


def test_words() -> None:
    in_two_processes(check_words)
