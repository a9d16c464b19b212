"""What passes between a step and a table of scores: the rows' weights one way, what the step saw the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from selbp._checks import shown
from selbp.common.batch import Batch
from selbp.common.outputs import logits_in
from selbp.sampling.issued import Draw
from selbp.sampling.table import ScoreTable
from selbp.selectors import Selector
from selbp.training.losses import Criterion
from selbp.types import Selection

IRREDUCIBLE = "irreducible_loss"  # by which selbp.ReducibleLoss knows it


def check_table(table: object) -> ScoreTable | None:
    """``table``. Raises TypeError unless it is None or a :class:`selbp.sampling.ScoreTable`."""
    if table is not None and not isinstance(table, ScoreTable):
        raise TypeError(f"table must be a selbp.sampling.ScoreTable or None, got {shown(table)}")
    return table


def with_irreducible(batch: Batch, table: ScoreTable, draw: Draw) -> Batch:
    """The batch with what the table knows of each sample's irreducible loss, unless the caller has said it."""
    if table.irreducible is None or IRREDUCIBLE in batch.extras:
        return batch
    waits = batch.device.type == "cpu"  # it reads at once: a copy to it must have landed
    loss = table.irreducible[draw.ids].to(batch.device, non_blocking=not waits)
    return replace(batch, extras={**batch.extras, IRREDUCIBLE: loss})


def weighted(selection: Selection, factor: Tensor, rule: Selector) -> Selection:
    """The selection with each row's weight times the sampler's factor (n,) for it.

    Raises ValueError for a rule that matches gradients: its weights are for rows that count alike.
    """
    if rule.needs == "gradients":
        raise ValueError(
            f"{rule!r} matches the mean of rows that count alike, and the sampler's weights='unbiased' does not let "
            "them: pass weights='mean' to the sampler, or a rule that does not match gradients"
        )
    indices, weights = selection
    return Selection(indices, weights * factor.to(weights)[indices])


def for_table(table: ScoreTable, criterion: Criterion, target: Any) -> Any:
    """What ``table`` is told of the minibatch beside the step's rows: the targets, for a table with classes.

    For one without, how many entries each sample's loss adds up, (n,) or None: it records their mean.
    """
    return target if table.classes is not None else criterion.terms(target)


def write_back(
    table: ScoreTable, draw: Draw, known: Any, output: Any, losses: Tensor, place: Tensor | None, live: Tensor
) -> None:
    """Record the rows ``place`` (k,) of the minibatch (None: all), those that are ``live`` (k,) bool.

    ``output`` is the model's of these rows, ``losses`` (k,) theirs, ``known`` what :func:`for_table` gives.
    """
    if table.classes is None:
        losses = losses.detach()
        if known is not None:
            terms = known if place is None else known[place]
            losses = losses / terms.to(losses).clamp(min=1)
        table.record(draw, live, losses=losses, place=place, live=live)
        return
    target = known
    logits = logits_in(output)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not isinstance(target, Tensor) or target.dim() != 1:
        raise ValueError(
            f"a table with classes needs logits (n, {table.classes}) and a target (n,), got {shown(logits)} and "
            f"{shown(target)}; for other outputs leave classes= out: ScoreTable(len(dataset))"
        )
    rows = target if place is None else target[place]
    table.record(draw, rows, logits=logits, place=place, live=live)
