"""What a step reports. Nothing is read back from the device until someone looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selbp.common.figures import Choice, SelectionFigures
from selbp.common.proxies import HeadProxies
from selbp.sampling.table import ScoreTable
from selbp.training.schedule import rows_at_cost, step_cost
from selbp.training.stopwatch import Stopwatch
from selbp.types import BatchStatistics, Selection

_FIGURES = (
    *("n", "k", "step", "selected", "scored", "backward", "backward_reason", "loss", "accuracy"),
    *("weight_sum", "weight_max", "effective_sample_size", "relative_residual", "gain", "gain_at_cost", "seconds"),
)
OF_THE_TABLE = ("headroom", "price", "noise_share", "coverage")


@dataclass
class StepReport(SelectionFigures):
    """One step's figures. The attributes are known at once; the properties synchronise with the device when read.

    Figures that the step had no means to know are None: accuracy, for a loss without classes; those of gradients, where
    nothing was scored, no head was found, a rule that reads losses would have to keep large tensors for them, or the
    mean gradient is that of all ranks and the rule did not read it.

    In batches of a sampler with ``weights="unbiased"`` samples have factors. ``relative_residual`` and ``gain`` compare
    the choice with the mean of the gradients times these; the weights hold them; ``loss`` and ``accuracy`` do not.

    Attributes
    ----------
    n : int
        Samples of the minibatch.
    k : int
        Rows that ran backward.
    step : int
        Optimizer steps before this one.
    selected : bool
        Whether the rule chose; False outside the schedule: a full step, or rows drawn at random.
    scored : bool
        Whether a forward on all rows was paid for scoring.
    backward : str
        The strategy used.
    backward_reason : str
        Why this strategy was used.
    selection : Selection
        Rows and weights.

    Raises
    ------
    RuntimeError
        By a figure of the choice, where a cut chooses in the backward and that has not run.

    See Also
    --------
    selbp.SelectiveBackprop : its ``report`` is one.
    selbp.CutReport : what a cut reports.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)
    >>> step(torch.randn(16, 4), torch.randint(0, 3, (16,))).backward()
    >>> step.report.n, step.report.k, step.report.weight_sum
    (16, 4, 1.0)
    >>> step.report.relative_residual > 0
    True
    """

    n: int  # samples of the minibatch
    k: int  # rows that ran backward
    step: int  # optimizer steps before this one
    selected: bool  # whether the rule chose; False outside the schedule: a full step, or rows drawn at random
    scored: bool  # whether a forward on all rows was paid for scoring
    backward: str  # the strategy used
    backward_reason: str  # why this strategy
    selection: Selection = field(repr=False)  # rows and weights
    _stats: BatchStatistics = field(repr=False)
    _proxies: HeadProxies | None = field(repr=False)
    _chosen: Tensor = field(repr=False)  # (k,) scaled losses of the chosen rows
    _hits: tuple[Tensor, Tensor] | None = field(repr=False)
    _watch: Stopwatch = field(repr=False)
    share: Tensor | None = field(default=None, repr=False)  # () of an accumulated loss, where a normalizer was given
    table: ScoreTable | None = field(default=None, repr=False)  # the step's, whose figures are those of the moment
    _own: Selection | None = field(default=None, repr=False)  # the rule's choice, where a sampler's factors came on top

    @cached_property
    def headroom(self) -> float | None:
        """The table's: the batch multiplier that the best odds could have; None without a table."""
        return None if self.table is None else self.table.headroom

    @cached_property
    def price(self) -> float | None:
        """What a step of this kind costs over random's, as :class:`selbp.AutoSelect` measured it; None where not."""
        return None if self.table is None else self.table.price

    @cached_property
    def noise_share(self) -> float | None:
        """The table's estimate of the share of wrong labels; None without a table."""
        return None if self.table is None else self.table.noise_share

    @cached_property
    def coverage(self) -> float | None:
        """Share of all samples that have been trained on while the table watched; None without a table."""
        return None if self.table is None else self.table.coverage

    @cached_property
    def loss(self) -> float:
        """Unweighted mean loss of the minibatch; of the chosen rows, where no others were scored."""
        return float(self.mean_loss())

    def mean_loss(self) -> Tensor:
        """() :attr:`loss` on the device: nothing waits."""
        valid = self._stats.valid
        if self.scored:
            return torch.where(valid, self._stats.loss, 0).sum() / self.n
        live = self.selection.weights != 0
        mean = torch.where(live, self._chosen, 0).sum() / live.sum().clamp(min=1)
        return mean * valid.sum() / self.n

    def hits(self) -> tuple[Tensor, Tensor] | None:
        """() correctly classified entries and () all entries on the device; None for a loss without classes."""
        return self._hits

    @cached_property
    def accuracy(self) -> float | None:
        """Share of correctly classified entries, of the rows that :attr:`loss` is about."""
        if self._hits is None:
            return None
        correct, total = (int(x) for x in self._hits)
        return correct / total if total else None

    @cached_property
    def gain_at_cost(self) -> float | None:
        """:attr:`gain` against as many random rows as this step's cost would pay for, without a scoring forward."""
        return self._gain_over(rows_at_cost(self.n, step_cost(self.n, self.k, scored=True, backward=self.backward)))

    def _choice(self) -> Choice:
        own = self.selection if self._own is None else self._own
        return Choice(self.selection.weights, own, self._stats, self._proxies)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the phases score, select, forward and, once it has run, backward."""
        return self._watch.seconds()

    def as_dict(self) -> dict[str, Any]:
        """Every figure by name, ready for a log line."""
        table = () if self.table is None else OF_THE_TABLE
        return {name: getattr(self, name) for name in (*_FIGURES, *table)}
