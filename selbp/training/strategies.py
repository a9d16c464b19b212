"""How the chosen rows' losses get their graph: from the forward that scored them, or from a second forward.

Where a full step costs 3 forwards, ``rows`` costs 1 + 2 k / n, and ``recompute``, which works for every model,
1 + 3 k / n. ``auto`` takes the one with the smaller modelled time; under ``fully_shard``, rows where they need fewer
FLOPs on every rank (``sharded.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp._checks import check_choice
from selbp.common.batch import Batch
from selbp.rows import BatchNormPolicy, select
from selbp.training.analysis import analyse_batch
from selbp.training.losses import Criterion
from selbp.training.sharded import is_fully_sharded, keeps_gradients_back, prefers_rows
from selbp.types import Selection

Way = Literal["rows", "recompute"]
WAYS = ("auto", "rows", "recompute")  # what ``backward=`` may be
UNDECIDED = "not decided yet"
UNSCORED = "nothing is scored: one forward, of the rows that train"


def may_ask(device: torch.device) -> bool:
    """Whether a tensor's value on ``device`` can be read without a synchronisation."""
    return device.type == "cpu"


def row_losses(
    trains: Tensor,  # (n,) losses of the scoring forward, or its logits (n, ..., C), with their graph
    selection: Selection,
    again: Callable[[], Tensor],  # (n,) losses of a forward of all rows, with zeros in place of NaN
    to_losses: Callable[[Tensor, Tensor], Tensor] | None = None,  # of chosen rows' logits and their indices
    batchnorm: BatchNormPolicy = "exact",
    dense: Counter[str] | None = None,
) -> Tensor:
    """(k,) losses, whose backward runs the chosen rows of ``trains`` only.

    A slot of weight 0 may name a row that holds NaN, and 0 * NaN would reach every parameter. Such a slot repeats a row
    that has a weight. Where no row has one, a CPU and a GPU differ. On a CPU the gradients of 0 come from another
    forward. On a GPU asking would wait for the device, so :func:`selbp.rows.select` decides.
    """
    live = selection.weights != 0
    asked = may_ask(live.device)
    if asked and not live.any():
        return again().index_select(0, selection.indices)
    spare = selection.indices.index_select(0, live.to(torch.int8).argmax(0, keepdim=True))
    indices = torch.where(live, selection.indices, spare)
    any_valid = None if asked else live.any()
    chosen: Tensor = select(trains, indices, batchnorm=batchnorm, densified=dense, any_valid=any_valid)
    if to_losses is None:
        return chosen
    if any_valid is not None:  # where no row has a weight, the loss's gradient is 0 * NaN
        chosen = torch.where(any_valid, chosen, 0)
    return to_losses(chosen, indices)


class Strategy:
    """What a step does for ``backward=``: ``"rows"``, ``"recompute"``, or ``"auto"``, which one of them becomes.

    ``"auto"`` is decided once, on the first minibatch, by a forward and a backward of at most 8 of its samples. The
    decision is a function of model, batch size, threads and allocator, not of a clock, and a part of the step's state:
    a resumed run goes on as it began.

    Raises:
        ValueError: for another ``backward``.
    """

    def __init__(self, backward: str, batchnorm: BatchNormPolicy = "exact", reason: str = "asked for") -> None:
        check_choice("backward", backward, WAYS)
        self.auto = backward == "auto"
        self.batchnorm = batchnorm
        self.dense: Counter[str] = Counter()  # operators that ran on n rows, over the strategy's life
        self._way: Way | None = None if self.auto else "rows" if backward == "rows" else "recompute"
        self.reason = UNDECIDED if self.auto else reason

    @property
    def name(self) -> Way:
        """The way in use: recompute until another is decided."""
        return self._way or "recompute"

    @property
    def undecided(self) -> bool:
        """Whether ``"auto"`` has seen no minibatch yet."""
        return self._way is None

    @property
    def keeps_graph(self) -> bool:
        """Whether the scoring forward is the one that trains: it records a graph and hands its losses over."""
        return self._way == "rows"

    @property
    def decision(self) -> Way | None:
        """What ``"auto"`` decided; None where it has not, or where nothing was left to decide."""
        return self._way if self.auto else None

    def settle(self, way: Way, reason: str) -> None:
        """Take ``way``, whatever was decided."""
        self._way, self.reason = way, reason

    def restore(self, decision: Way | None) -> None:
        """Take over what another process decided; None where it had not."""
        if self.auto:
            self._way = decision
            self.reason = UNDECIDED if decision is None else "decided before the run was resumed"

    def decide(
        self,
        model: nn.Module,
        batch: Batch,
        k: int,
        criterion: Criterion,
        scoring: str,
        auxiliary: Callable[[Any], Tensor | None] = lambda output: None,
    ) -> None:
        """Choose for this model. Gradients, buffers and random state are left as they are.

        ``auxiliary`` reads a further loss off the model's output, which rows would differentiate for all samples.
        """
        if is_fully_sharded(model) and keeps_gradients_back(model):
            return  # a look ahead would not reduce gradients; decide at a step whose backward does
        if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):  # else: until there is
            self.settle(*self._cheaper(model, batch, k, criterion, scoring, auxiliary))

    def _cheaper(
        self,
        model: nn.Module,
        batch: Batch,
        k: int,
        criterion: Criterion,
        scoring: str,
        auxiliary: Callable[[Any], Tensor | None],
    ) -> tuple[Way, str]:
        if scoring == "eval":
            return "recompute", 'scoring="eval": the forward that scores is not the one that trains'
        if batch.device.type != "cpu":
            return "recompute", f"rows have not been measured ahead on {batch.device.type}"

        def losses(pair: Any) -> Tensor:
            few, output = pair
            if (found := auxiliary(output)) is not None and found.requires_grad:
                raise NotImplementedError("the model's auxiliary loss has a gradient for every sample")
            return criterion.losses(output, few.target, few.n)

        try:
            if is_fully_sharded(model):
                rows, cost, dense = prefers_rows(model, batch, k, losses, batchnorm=self.batchnorm)
                return "rows" if rows else "recompute", _reason("FLOPs", cost, dense)
            found = analyse_batch(model, batch, k, losses, batchnorm=self.batchnorm)
        except NotImplementedError as error:
            return "recompute", f"no rows: {str(error).removeprefix('selbp: ')}"
        except Exception as error:  # of the probe's few samples, or out of memory; a fault of the model comes up again
            return "recompute", f"the look ahead failed: {type(error).__name__}: {error}"
        share = {name: seconds / max(found.seconds["full"], 1e-12) for name, seconds in found.seconds.items()}
        return found.recommendation, _reason("modelled time", share, list(found.dense))


def _reason(what: str, share: dict[str, float], dense: list[str]) -> str:
    said = f"{what} {share['rows']:.2f} on rows, {share['recompute']:.2f} by recomputing, of a full step's"
    return f"{said}; not on rows: {', '.join(dense)}" if dense else said
