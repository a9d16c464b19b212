"""``backward="auto"``: rows where their modelled time is below that of a second forward, else recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selbp.ops.types import Selection
from selbp.training.backward.recompute import Recompute
from selbp.training.backward.rows.layout import BatchNormPolicy
from selbp.training.backward.rows.strategy import Rows
from selbp.training.batch import Batch

if TYPE_CHECKING:
    from selbp.training.losses import Criterion


class Auto:
    """Decides once, on the first minibatch, by a forward and a backward of at most 8 of its samples.

    The decision is a function of model, batch size, threads and allocator, not of a clock; it is part of the step's
    state, so that a resumed run goes on as it began.
    """

    def __init__(self, batchnorm: BatchNormPolicy = "exact") -> None:
        self.batchnorm = batchnorm  # of the rows
        self._chosen: Rows | Recompute | None = None
        self.reason = "not decided yet"

    @property
    def decided(self) -> bool:
        """Whether a minibatch has been seen."""
        return self._chosen is not None

    @property
    def decision(self) -> str | None:
        """``"rows"`` or ``"recompute"``; None before it is made."""
        return None if self._chosen is None else self._chosen.name

    def restore(self, chosen: str | None) -> None:
        """Take over what another process decided; None where it had not."""
        self._chosen = None if chosen is None else Rows(self.batchnorm) if chosen == "rows" else Recompute()
        self.reason = "not decided yet" if chosen is None else "decided before the run was resumed"

    def use_rows(self, reason: str) -> None:
        """Take rows, whatever was decided."""
        self._chosen, self.reason = Rows(self.batchnorm), reason

    @property
    def name(self) -> str:
        """The strategy in use."""
        return self._current.name

    @property
    def keeps_graph(self) -> bool:
        """As the strategy in use."""
        return self._current.keeps_graph

    @property
    def _current(self) -> Rows | Recompute:
        return Recompute() if self._chosen is None else self._chosen

    def decide(
        self,
        model: nn.Module,
        batch: Batch,
        k: int,
        criterion: Criterion,
        scoring: str,
        auxiliary: Callable[[Any], Tensor | None] = lambda output: None,
    ) -> None:
        """Choose the strategy for this model. Gradients, buffers and random state are left as they are.

        ``auxiliary`` reads a further loss off the model's output, which rows would differentiate for all samples.
        """
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in model.parameters()):
            return  # nothing to differentiate: recompute until there is
        self._chosen, self.reason = self._decide(model, batch, k, criterion, scoring, auxiliary)

    def _decide(
        self,
        model: nn.Module,
        batch: Batch,
        k: int,
        criterion: Criterion,
        scoring: str,
        auxiliary: Callable[[Any], Any],
    ) -> tuple[Rows | Recompute, str]:
        from selbp.training.diagnose import analyse_batch  # imports the strategies' package

        if scoring == "eval":
            return Recompute(), 'scoring="eval": the forward that scores is not the one that trains'
        if batch.device.type != "cpu":
            return Recompute(), f"rows have not been measured ahead on {batch.device.type}"

        def losses(pair: Any) -> Tensor:
            few, output = pair
            if (found := auxiliary(output)) is not None and found.requires_grad:
                raise NotImplementedError("the model's auxiliary loss has a gradient for every sample")
            return criterion.losses(output, few.target, few.n)

        try:
            found = analyse_batch(model, batch, k, losses, batchnorm=self.batchnorm)
        except NotImplementedError as error:
            return Recompute(), f"no rows: {str(error).removeprefix('selbp: ')}"
        except Exception as error:  # of the probe's few samples, or out of memory; a fault of the model comes up again
            return Recompute(), f"the look ahead failed: {type(error).__name__}: {error}"
        share = {name: seconds / max(found.seconds["full"], 1e-12) for name, seconds in found.seconds.items()}
        reason = f"modelled time {share['rows']:.2f} on rows, {share['recompute']:.2f} by recomputing, of a full step's"
        if found.dense:
            reason += f"; not on rows: {', '.join(found.dense)}"
        return Rows(self.batchnorm) if found.recommendation == "rows" else Recompute(), reason

    def chosen_losses(
        self, batch: Batch, selection: Selection, forward: Callable[[Batch], Tensor], losses: Tensor | None
    ) -> Tensor:
        """As the strategy in use."""
        return self._current.chosen_losses(batch, selection, forward, losses)
