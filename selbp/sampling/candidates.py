"""What the controller chooses among, and what it says of a choice."""

from __future__ import annotations

from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """One way to make a step.

    Parameters
    ----------
    step : SelectiveBackprop
        With the sampler's table.
    k : int or None
        Rows of the sampler's batches; None: the sampler's own.
    scored : bool
        Whether they are drawn by the table's odds.

    See Also
    --------
    selbp.AutoSelect : times candidates and takes the best.

    Examples
    --------
    >>> import torch, selbp
    >>> table, model = selbp.sampling.ScoreTable(64, classes=3), torch.nn.Linear(5, 3)
    >>> step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=8, table=table)
    >>> sampler = selbp.sampling.ScoredBatchSampler(table, k=16)
    >>> largest = Candidate(step, k=32, scored=False)  # the 8 largest losses of 32 random rows
    >>> selbp.AutoSelect(step, sampler, others={"largest losses": largest}).candidates["largest losses"].k
    32
    """

    step: Any
    k: int | None = None
    scored: bool = True


class Decision(NamedTuple):
    """A line of the controller's log.

    Attributes
    ----------
    step : int
        Steps before it.
    chosen : str
        The candidate's name.
    headroom : float
        The table's, at that step.
    prices : dict
        Of each candidate, over random's.
    why : str
        The reason, in words.

    See Also
    --------
    selbp.AutoSelect : its ``log`` holds decisions.

    Examples
    --------
    >>> line = Decision(step=100, chosen="drawn", headroom=2.1, prices={"random": 1.0, "drawn": 1.3}, why="it pays")
    >>> line.headroom / line.prices[line.chosen] > 1.0
    True
    """

    step: int
    chosen: str
    headroom: float
    prices: dict[str, float]
    why: str
