"""A random program as a model under ``SelectiveBackprop``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from model_context import F64, Context, Store
from model_generator import Program, run
from torch import Tensor, nn

import selbp


def step_selectors() -> dict[str, Any]:
    """Rules that look at the losses or the gradients of all samples, as rows of that forward need."""
    return {
        "TopLoss": selbp.TopLoss,
        "TopGradNorm": selbp.TopGradNorm,
        "GradientMatching": selbp.GradientMatching,
        "GradNormImportance": selbp.GradNormImportance,
    }


class ProgramModel(nn.Module):
    """The program, and a linear head of three classes."""

    def __init__(self, program: Program, store: Store) -> None:
        super().__init__()
        self.program, self.store, self.rows = program, store, False
        self.found = nn.ModuleList([kept for kept in store.kept.values() if isinstance(kept, nn.Module)])
        self.own = nn.ParameterList({id(p): p for p in store.parameters}.values())
        torch.manual_seed(program.seed)
        self.head = nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        last = run(self.program, self.store, rows=self.rows, x=x, finish=False).last
        c = Context(self.store, len(x), self.rows)
        c.enter("head")
        return self.head(c.fit(last, 4))


def step_gradients(program: Program, store: Store, selector: str, backward: str) -> tuple[Any, Any]:
    """The gradients of a step, and of the weighted losses of the rows that it reports, by plain torch."""
    model = ProgramModel(program, store)
    x = store.kept["input"].detach()
    y = torch.randint(3, (program.n,), generator=torch.Generator().manual_seed(program.seed))
    step = selbp.SelectiveBackprop(
        model,
        selector=step_selectors()[selector](),
        keep=max(1, program.n // 2),
        head=model.head,
        backward=backward,
        generator=torch.Generator().manual_seed(program.seed),
    )

    def collect() -> dict[str, Any]:
        found = {f"leaf {name}": p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return found

    model.zero_grad(set_to_none=True)
    model.rows = True
    step(x, y).backward()
    got, selection = collect(), step.report.selection
    model.rows = False
    losses = F.cross_entropy(model(x), y, reduction="none")
    (losses[selection.indices] * selection.weights.to(F64)).sum().backward()
    return got, collect()
