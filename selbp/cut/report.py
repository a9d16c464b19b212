"""What a cut reports of its last backward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from selbp.common.figures import Choice, SelectionFigures
from selbp.common.proxies import HeadProxies
from selbp.cut.proxies import FlatProxies
from selbp.types import BatchStatistics, Selection


@dataclass
class CutReport(SelectionFigures):
    """What a cut chose in its last backward.

    The fields are known at once. The properties synchronise with the device when they are read. If the cut is below
    another one, ``relative_residual`` and ``gain`` are about its choice among the rows that the upper cut passed on.

    Attributes
    ----------
    n : int
        Samples of the minibatch.
    k : int
        Rows that were passed on.
    selection : Selection
        (k,) int64 indices among the n samples, and weights w: sum_j w_j g_j estimates (1 / n) sum_i g_i.
    dense : Counter
        Operators below the cut that ran on n rows, by name.

    See Also
    --------
    selbp.BackwardCut : its ``report`` is one.

    Examples
    --------
    >>> import torch, selbp
    >>> cut = selbp.BackwardCut(keep=4)
    >>> cut(torch.randn(16, 8, requires_grad=True)).square().mean().backward()
    >>> cut.report.n, cut.report.k
    (16, 4)
    """

    n: int
    k: int
    selection: Selection
    dense: Counter[str] = field(default_factory=Counter)
    _local: Selection | None = field(default=None, repr=False)  # indices among the rows that arrived
    _stats: BatchStatistics | None = field(default=None, repr=False)  # of the rows that arrived
    _proxies: FlatProxies | HeadProxies | None = field(default=None, repr=False)

    def _choice(self) -> Choice:
        local = self.selection if self._local is None else self._local
        return Choice(self.selection.weights, local, self._stats, self._proxies)
