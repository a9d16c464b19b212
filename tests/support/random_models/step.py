"""A random program as a model under ``SelectiveBackprop``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import selbp
from support.random_models.context import F64, Context, Store
from support.random_models.generator import Program, run

# Rules that look at the losses or the gradients of all samples, as rows of that forward need.
RULES: dict[str, Any] = {
    "TopLoss": selbp.TopLoss,
    "TopGradNorm": selbp.TopGradNorm,
    "GradientMatching": selbp.GradientMatching,
    "GradNormImportance": selbp.GradNormImportance,
}


class Trunk(nn.Module):
    """The program without its losses."""

    def __init__(self, program: Program, store: Store) -> None:
        super().__init__()
        self.program, self.store, self.rows = program, store, False
        self.found = nn.ModuleList([kept for kept in store.kept.values() if isinstance(kept, nn.Module)])
        self.own = nn.ParameterList({id(p): p for p in store.parameters}.values())

    def forward(self, x: Tensor) -> Tensor:
        last = run(self.program, self.store, rows=self.rows, x=x, finish=False).last
        c = Context(self.store, len(x), self.rows)
        c.enter("head")
        return c.fit(last, 4)


class ProgramModel(nn.Module):
    """The program, and a linear head of three classes."""

    def __init__(self, program: Program, store: Store) -> None:
        super().__init__()
        torch.manual_seed(program.seed)
        self.trunk, self.head = Trunk(program, store), nn.Linear(4, 3, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x))


def step_gradients(program: Program, store: Store, rule: str, backward: str, cut: bool) -> tuple[Any, Any]:
    """The gradients of a step, and by plain torch those of the rows that it reports: of losses, or at the cut."""
    model = ProgramModel(program, store)
    x = store.kept["input"].detach()
    y = torch.randint(3, (program.n,), generator=torch.Generator().manual_seed(program.seed))
    step = selbp.SelectiveBackprop(
        model,
        selector=selbp.Random() if cut else RULES[rule](),
        keep=max(1, program.n // 2),
        backward=backward,
        generator=torch.Generator().manual_seed(program.seed),
        **({"cut": "trunk"} if cut else {"head": model.head}),
    )

    def collect() -> dict[str, Any]:
        found = {f"leaf {name}": p.grad for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return found

    model.zero_grad(set_to_none=True)
    model.trunk.rows = True
    step(x, y).backward()
    got, report = collect(), step.report
    model.trunk.rows = False
    if not cut:
        losses = F.cross_entropy(model(x), y, reduction="none")
        (losses[report.selection.indices] * report.selection.weights.to(F64)).sum().backward()
        return got, collect()
    hidden = model.trunk(x)
    if report.cut is not None and hidden.requires_grad:
        hidden.register_hook(only_rows(report.cut.selection, program.n))
    losses = F.cross_entropy(model.head(hidden), y, reduction="none")
    (losses * report.selection.weights.to(F64)).sum().backward()
    return got, collect()


def only_rows(chosen: Any, n: int) -> Any:
    """A hook that does by hand what a cut does: chosen rows of the gradient, scaled by n times their weights."""

    def hook(gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            return None
        weights = (n * chosen.weights).to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))
        return torch.zeros_like(gradient).index_add_(0, chosen.indices, gradient[chosen.indices] * weights)

    return hook
