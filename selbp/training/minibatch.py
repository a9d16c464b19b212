"""One minibatch on its way through a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

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
    # From the scoring, or from what is known without one:
    stats: BatchStatistics = field(init=False)  # losses scaled as the report averages them
    unscaled: Tensor = field(init=False)  # (n,) losses as the criterion gives them
    trains: Tensor | None = field(init=False)  # (n,) the same, or the logits (n, ..., C), with the graph that is kept
    scale: Tensor = field(init=False)  # ()
    share: Tensor | None = field(init=False)  # () of an accumulated loss
    auxiliary: Tensor | None = field(init=False)  # () the model's own further loss
    hits: tuple[Tensor, Tensor] | None = field(init=False)
    seen: tuple[Any, Tensor, Tensor | None, Tensor] = field(init=False)  # output, losses, rows, live: for the table
    proxies: HeadProxies | None = None  # for the report
    mean: MeanGradient | None = None  # of the head, for its full-batch gradient
    # From the choice:
    selection: Selection = field(init=False)
    live: Tensor = field(init=False)  # (k,) bool: the slots that have a weight
    # From the forward that trains:
    output: Any = None
    scaled: Tensor = field(init=False)  # (k,) losses of the chosen rows, as torch's mean counts them

    def take(self, scored: Scored) -> None:
        """Keep what the rest of the step needs of ``scored``: not its factors, which are large."""
        stats = scored.stats
        self.unscaled, self.scale, self.trains = stats.loss, scored.scale, scored.trains
        self.stats = stats._replace(loss=stats.loss * scored.scale if scored.scaled is None else scored.scaled)
        self.auxiliary, self.hits = scored.auxiliary, scored.hits
        self.share = self.call.share(scored, self.batch.n)
        self.seen = scored.output, stats.loss, None, stats.valid

    def choose(self, selection: Selection) -> None:
        """Keep the rows that train."""
        self.selection, self.live = selection, selection.weights != 0

    def chosen_rows(self) -> Batch:
        """The chosen rows; slots of weight 0 are zeros for floating inputs."""
        return self.batch.rows(self.selection.indices, self.live)

    def report(self, kind: type[Report], step: int, way: str, reason: str, *, scored: bool = False) -> Report:
        """The report of the step number ``step``, which went ``way``."""
        return kind(
            n=self.batch.n,
            k=self.k,
            step=step,
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
        )
