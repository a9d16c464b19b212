"""How the chosen rows' losses get their graph: a strategy turns a selection into k differentiable losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from selbp.ops.types import Selection
from selbp.selectors.checks import shown
from selbp.training.backward.auto import Auto
from selbp.training.backward.recompute import Recompute
from selbp.training.backward.rows.layout import BatchNormPolicy
from selbp.training.backward.rows.strategy import Rows
from selbp.training.batch import Batch

__all__ = ["STRATEGIES", "Auto", "BackwardStrategy", "Recompute", "Rows", "register", "resolve"]


class BackwardStrategy(Protocol):
    """What the step asks of a strategy."""

    @property
    def name(self) -> str:
        """``backward=`` of the contract."""
        ...

    @property
    def keeps_graph(self) -> bool:
        """Whether the scoring forward is the one that trains: it records a graph and hands its losses over."""
        ...

    def chosen_losses(
        self,
        batch: Batch,
        selection: Selection,
        forward: Callable[[Batch], Tensor],  # rows of a batch -> their per-sample losses
        losses: Tensor | None,  # (n,) of the scoring forward with their graph, where ``keeps_graph``
    ) -> Tensor:
        """(k,) losses whose backward reaches the parameters through the chosen rows only."""
        ...


STRATEGIES: dict[str, BackwardStrategy] = {}


def register(strategy: BackwardStrategy) -> None:
    """Make ``strategy`` available as ``backward=strategy.name``."""
    STRATEGIES[strategy.name] = strategy


def resolve(backward: str, batchnorm: BatchNormPolicy = "exact") -> tuple[BackwardStrategy, str]:
    """The strategy for a ``backward=`` of the contract, and why it is that one. Raises ValueError."""
    if not isinstance(backward, str) or backward not in ("auto", *STRATEGIES):
        raise ValueError(f"backward must be 'auto', {' or '.join(map(repr, STRATEGIES))}, got {shown(backward)}")
    if backward == "auto":
        return Auto(batchnorm), "not decided yet"
    if backward == "rows":
        return Rows(batchnorm), "asked for"
    return STRATEGIES[backward], "asked for"


register(Recompute())
register(Rows())
