"""Backward through a second forward that runs the chosen rows only: works for every model, costs 1 + 3k/n."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from selbp.ops.types import Selection
from selbp.training.batch import Batch


class Recompute:
    """Forward the k chosen rows again, with a graph."""

    name = "recompute"
    keeps_graph = False

    def chosen_losses(
        self, batch: Batch, selection: Selection, forward: Callable[[Batch], Tensor], losses: Tensor | None
    ) -> Tensor:
        """(k,) losses of the chosen rows; slots of weight 0 run on zeros in place of floating inputs."""
        return forward(batch.rows(selection.indices, selection.weights != 0))
