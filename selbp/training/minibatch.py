"""One minibatch on its way through a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from selbp.common.batch import Batch
from selbp.common.proxies import HeadProxies
from selbp.sampling.issued import Draw
from selbp.training.per_call import PerCall
from selbp.training.report import StepReport
from selbp.training.scored import Scored
from selbp.training.stopwatch import Stopwatch
from selbp.types import BatchStatistics, MeanGradient, Selection

Report = TypeVar("Report", bound=StepReport)


def in_order(selection: Selection, scored: Scored) -> Selection:
    """A selection of n slots from n rows, as all the rows in order.

    Spare slots repeat a row. Where all rows are kept, each runs once instead, with a weight or without one, so that
    batch norm sees the minibatch as it came. In the place of a row that has a target and is not valid, one that has a
    weight is repeated: token ids that lead to NaN cannot be replaced by zeros.
    """
    indices, weights = selection
    assert scored.mass is not None
    summed = torch.zeros_like(weights).index_add_(0, indices, weights)
    spare = indices.index_select(0, (weights != 0).to(torch.int8).argmax(0, keepdim=True))
    runs = scored.stats.valid | (scored.mass == 0) | (summed != 0)
    return Selection(torch.where(runs, torch.arange(len(indices), device=indices.device), spare), summed)


@dataclass(slots=True)
class Minibatch:
    """What came with the minibatch, and then what the step has found."""

    batch: Batch
    call: PerCall
    draw: Draw | None  # of the table's sampler
    rule: Any  # chooses the rows
    k: int  # how many rows it is asked for
    selected: bool  # whether the schedule has the rule choose
    watch: Stopwatch
    step: int  # the number of the optimizer step
    # From the scoring, or from what is known without one:
    stats: BatchStatistics = field(init=False)  # losses scaled as the report averages them
    unscaled: Tensor = field(init=False)  # (n,) losses as the criterion gives them
    trains: Tensor | None = field(init=False)  # (n,) losses, or the logits (n, ..., C); None unless their graph is kept
    scale: Tensor = field(init=False)  # ()
    share: Tensor | None = field(init=False)  # () of an accumulated loss
    auxiliary: Tensor | None = field(init=False)  # () the model's own further loss
    hits: tuple[Tensor, Tensor] | None = field(init=False)
    seen: tuple[Any, Tensor, Tensor | None, Tensor] = field(init=False)  # output, losses, rows, live: for the table
    finite: Tensor | None = None  # (n,) bool: the rows that :func:`may_run`; None until somebody asks
    proxies: HeadProxies | None = None  # for the report
    mean: MeanGradient | None = None  # of the head, for its full-batch gradient
    # From the choice:
    selection: Selection = field(init=False)
    own: Selection | None = None  # the rule's, without a sampler's factors, where there are some
    live: Tensor = field(init=False)  # (k,) bool: the slots that have a weight
    # From the forward that trains:
    output: Any = None
    scaled: Tensor = field(init=False)  # (k,) losses of the chosen rows, as torch's mean counts them

    def take(self, scored: Scored) -> None:
        """Keep what the rest of the step needs of ``scored``: not its factors, which are large."""
        stats = scored.stats
        self.unscaled, self.scale, self.trains = stats.loss, scored.scale, scored.trains
        self.stats = stats._replace(loss=stats.loss * scored.scale if scored.scaled is None else scored.scaled)
        self.auxiliary, self.hits, self.finite = scored.auxiliary, scored.hits, scored.finite
        self.share = self.call.share(scored, self.batch.n)
        self.seen = scored.output, stats.loss, None, stats.valid

    def choose(self, selection: Selection) -> None:
        """Keep the rows that train."""
        self.selection, self.live = selection, selection.weights != 0

    def report(self, kind: type[Report], way: str, reason: str, *, scored: bool = False) -> Report:
        """The report of the step, which went ``way``."""
        return kind(
            n=self.batch.n,
            k=self.k,
            step=self.step,
            selected=self.selected,
            scored=scored,
            backward=way,
            backward_reason=reason,
            selection=self.selection,
            _stats=self.stats,
            _proxies=self.proxies,
            _chosen=self.scaled.detach(),
            _hits=self.hits,
            _watch=self.watch,
            share=self.share,
            _own=self.own,
        )
