"""``backward="rows"`` of the training step: the chosen rows of the forward that scored the minibatch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from selbp.ops.types import Selection
from selbp.training.backward.rows.layout import BatchNormPolicy
from selbp.training.backward.rows.select import select
from selbp.training.batch import Batch


def may_ask(device: torch.device) -> bool:
    """Whether reading a tensor's value on ``device`` makes nobody wait."""
    return device.type == "cpu"


class Rows:
    """Backward through k rows of the one forward: costs 1 + 2k/n where a full step costs 3."""

    name = "rows"
    keeps_graph = True

    def __init__(self, batchnorm: BatchNormPolicy = "exact") -> None:
        self.batchnorm = batchnorm
        self.dense: Counter[str] = Counter()  # operators that ran on n rows, over the strategy's life

    def chosen_losses(
        self, batch: Batch, selection: Selection, forward: Callable[[Batch], Tensor], losses: Tensor | None
    ) -> Tensor:
        """(k,) losses of the chosen rows; a slot of weight 0 repeats a row that has a weight, with a gradient of 0.

        The row it names may hold NaN, and 0 * NaN would reach every parameter. Where no row has a weight, all may: a
        forward on zeros then gives the gradients of 0, and on a GPU, where asking would wait, :func:`select` does.
        """
        if losses is None:
            raise AssertionError("the scoring forward was asked to keep its graph")
        live = selection.weights != 0
        asked = may_ask(live.device)
        if asked and not live.any():
            return forward(batch.rows(selection.indices, live))
        spare = selection.indices.index_select(0, live.to(torch.int8).argmax(0, keepdim=True))
        indices = torch.where(live, selection.indices, spare)
        chosen: Tensor = select(
            losses, indices, batchnorm=self.batchnorm, dense=self.dense, live=None if asked else live.any()
        )
        return chosen
