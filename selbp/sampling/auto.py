"""The controller: choose only while choosing pays, and say why."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from selbp._checks import check_choice, check_entries, check_int, check_number, reading, shown
from selbp.common.exchange import Ranks
from selbp.common.figures import median
from selbp.sampling.batches import ScoredBatchSampler
from selbp.sampling.candidates import Candidate, Decision
from selbp.sampling.table import ScoreTable

FALLBACK = "random"
TIMES = 32  # of the last steps of each candidate, whose median counts; of more where the trial is longer
SPARSE = 8  # of so many random steps one writes to the table: enough for headroom, and next to nothing on average
WARM = 2  # first steps of a candidate that do not count


class AutoSelect:
    """Steps that choose only while choosing pays: drawn by the table where headroom exceeds the price, else random.

    ::

        auto = selbp.AutoSelect(step, sampler, random_k=48)
        for inputs, target in loader:
            auto(inputs, target).backward()
            optimizer.step(); optimizer.zero_grad()

    *Headroom* h = mean(g^2) / mean(g)^2 over uniform rows (:attr:`selbp.sampling.ScoreTable.headroom`) is the factor by
    which the best odds could multiply the batch; it needs no row that would not run anyway. *Price* is the time of a
    candidate's step over that of random's. A step is timed from call to call, with backward, optimizer and loading: in
    processor time, on a GPU by the clock. A candidate is worth ``h * (its rows / random's rows) / price``, random 1.
    Every ``every`` steps the most valuable one takes over if it is worth ``1 + margin`` times the one in use; the one
    in use is left for random as soon as it is worth less than 1. In the beginning each candidate makes ``trial`` steps,
    for its price.

    With headroom near 1, as for windows of text, nothing is chosen: the step is random's at its own keep, and the
    controller costs a few microseconds: the draw is a slice of the epoch's order, and one step of eight writes to the
    table.

    Parameters
    ----------
    step : SelectiveBackprop
        The :class:`selbp.SelectiveBackprop` of ``"random"`` and ``"drawn"``, with ``table=`` the sampler's.
    sampler : ScoredBatchSampler
        Its batches are drawn as the controller says.
    random_k : int or None
        Rows of a random step; the sampler's k for None. Give random the keep that is best for it.
    others : dict or None
        Further candidates by name, each with a step of its own, such as one that scores a pool of 64.
    prices : dict or None
        Of each candidate's step over random's, where they are known: nothing is timed then, and a run is the same each
        time.
    every : int
        Steps between decisions.
    trial : int
        Timed steps of each candidate in the beginning.
    margin : float
        By how much more another one must be worth, at least 0.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    See Also
    --------
    selbp.auto_select : makes step, sampler and controller in one call.

    Examples
    --------
    >>> import torch, selbp
    >>> table, model = selbp.sampling.ScoreTable(64, classes=3), torch.nn.Linear(5, 3)
    >>> step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, table=table)
    >>> sampler = ScoredBatchSampler(table, k=8, pool=16)
    >>> auto = AutoSelect(step, sampler, prices={"random": 1.0, "drawn": 1.2})
    >>> x, y = torch.randn(64, 5), torch.randint(0, 3, (64,))
    >>> for ids in sampler:
    ...     auto(x[ids], y[ids]).backward()
    >>> auto.current, auto.report.k
    ('random', 8)
    """

    def __init__(
        self,
        step: Any,
        sampler: ScoredBatchSampler,
        *,
        random_k: int | None = None,
        others: Mapping[str, Candidate] | None = None,
        prices: Mapping[str, float] | None = None,
        every: int = 100,
        trial: int = 8,
        margin: float = 0.1,
    ) -> None:
        if not isinstance(sampler, ScoredBatchSampler):
            raise TypeError(f"sampler must be a selbp.sampling.ScoredBatchSampler, got {shown(sampler)}")
        self.candidates = {
            FALLBACK: Candidate(step, random_k, scored=False),
            "drawn": Candidate(step),
            **dict(others or {}),
        }
        for name, candidate in self.candidates.items():
            if not isinstance(candidate, Candidate) or not callable(candidate.step):
                raise TypeError(f"candidate {name!r} must be a Candidate with a step, got {shown(candidate)}")
            if getattr(candidate.step, "table", None) is not sampler.table:
                raise ValueError(f"the step of {name!r} must have table= the sampler's table")
        if self.candidates[FALLBACK].scored:
            raise ValueError(f"the candidate {FALLBACK!r} must not be scored")
        for name, candidate in self.candidates.items():
            if (getattr(candidate.step, "_ranks", None) is None) != (self._ranks is None):
                raise ValueError(
                    f"the steps of {FALLBACK!r} and {name!r} must have one scope, got a local and a global one"
                )
        self.sampler = sampler
        self.every, self.trial = check_int("every", every, 1), check_int("trial", trial, 1)
        self.margin = check_number("margin", margin, 0.0)
        self.log: list[Decision] = []
        self._fixed = None if prices is None else _checked(prices, self.candidates)
        self._times = self._kept({})
        self._count = dict.fromkeys(self.candidates, 0)
        self._shared: dict[str, float] = {}  # the means of all ranks' medians, of the last decision
        self._steps, self._last, self._all_priced = 0, ("", 0.0), self._fixed is not None
        self._last_step: Any = None
        self._use(FALLBACK)

    def _kept(self, times: Mapping[str, Iterable[float]]) -> dict[str, deque[float]]:
        """The last ``times`` of each candidate: at least as many as its trial has steps, else it would never end."""
        return {name: deque(times.get(name, ()), maxlen=max(TIMES, self.trial)) for name in self.candidates}

    def _use(self, name: str) -> None:
        candidate = self.candidates[name]
        every = 1 if candidate.scored else SPARSE
        self.sampler.use(k=candidate.k, scored=candidate.scored, tag=name, record_every=every)
        self.current = name

    def __call__(self, inputs: Any, target: Any = None, **per_sample: Tensor) -> Tensor:
        """One minibatch: the scalar to call ``backward()`` on, by the step that its batch was drawn for."""
        loss: Tensor = self._next_step(inputs, target)(inputs, target, **per_sample)
        return loss

    def backward(self, inputs: Any, target: Any = None, **options: Any) -> Tensor:
        """One minibatch, backward and all: :meth:`selbp.SelectiveBackprop.backward` of the step that it was drawn for.

        Parameters
        ----------
        inputs, target, **options
            As of that method. A step with ``micro_batch`` is run by it alone.

        Returns
        -------
        Tensor
            () the mean loss, detached.
        """
        loss: Tensor = self._next_step(inputs, target).backward(inputs, target, **options)
        return loss

    def _next_step(self, inputs: Any, target: Any) -> Any:
        """The step that the next batch was drawn for; what the last one took is noted, and a decision made if due."""
        draws = self.sampler.table.issued.draws
        name = draws[0].tag if draws and draws[0].tag in self.candidates else self.current
        if self._fixed is None:
            self._time(name, _on_gpu(target) or _on_gpu(inputs))
        self._steps += 1
        if self._steps % self.every == 0 or not (self._all_priced or self._on_trial()):
            self.decide()
        self._last_step = self.candidates[name].step
        return self._last_step

    def _time(self, name: str, on_gpu: bool) -> None:
        """Note what the last step took, where this one is of the same candidate."""
        now = time.perf_counter() if on_gpu else time.process_time()
        last, before = self._last
        if last == name:  # two alike in a row: what the first one took
            self._count[name] += 1
            if self._count[name] > WARM:
                self._times[name].append(now - before)
        self._last = name, now

    def _on_trial(self) -> bool:
        """Whether the candidate in use has not made its trial steps."""
        return self._fixed is None and len(self._times[self.current]) < self.trial

    def _without_price(self) -> list[str]:
        """Candidates whose price is not known."""
        return [] if self._fixed else [name for name, times in self._times.items() if len(times) < self.trial]

    @property
    def table(self) -> ScoreTable:
        """The sampler's :class:`selbp.sampling.ScoreTable`."""
        return self.sampler.table

    @property
    def step(self) -> Any:
        """The :class:`selbp.SelectiveBackprop` of ``"random"`` and ``"drawn"``."""
        return self.candidates[FALLBACK].step

    @property
    def report(self) -> Any:
        """The last step's :class:`selbp.StepReport`. Raises RuntimeError before the first one."""
        if self._last_step is None:
            raise RuntimeError("there is no report before the first step")
        return self._last_step.report

    @property
    def prices(self) -> dict[str, float]:
        """Median seconds of each candidate's steps over those of random's; of those that were measured.

        Where ranks make one choice, the seconds are the means of theirs at the last decision.
        """
        if self._fixed is not None:
            return dict(self._fixed)
        known = self._medians() if self._others() is None else self._shared
        base = known.get(FALLBACK, 0.0)
        return {name: seconds / base for name, seconds in known.items()} if base > 0 else {}

    def _medians(self) -> dict[str, float]:
        return {name: median(times) for name, times in self._times.items() if len(times) >= self.trial}

    @property
    def _ranks(self) -> Ranks | None:
        """Those of the steps. They are asked each time: a trainer makes its step after the controller."""
        ranks: Ranks | None = getattr(self.candidates[FALLBACK].step, "_ranks", None)
        return ranks

    def _others(self) -> Ranks | None:
        """The ranks that make one choice, where there are several."""
        ranks = self._ranks
        return ranks if ranks is not None and ranks.size > 1 else None

    def _headroom(self) -> float:
        """The table's. Of several ranks it is the mean, as are the seconds then, so that all decide alike."""
        own, headroom, ranks = self._medians(), self.sampler.table.headroom, self._others()
        if ranks is not None:
            headroom, *seconds = ranks.mean([headroom, *(own.get(name, math.nan) for name in self.candidates)])
            self._shared = {name: x for name, x in zip(self.candidates, seconds, strict=True) if x == x}
        return headroom

    def worth(self, headroom: float, prices: Mapping[str, float]) -> dict[str, float]:
        """What each measured candidate is worth, random's step being 1."""
        rows = {name: candidate.k or self.sampler.k for name, candidate in self.candidates.items()}
        return {
            name: (headroom if self.candidates[name].scored else 1.0) * rows[name] / rows[FALLBACK] / price
            for name, price in prices.items()
        }

    def decide(self) -> str:
        """Try the next candidate without a price, or choose among those that have one; log it, and return its name.

        Where ranks make one choice, all of them must call it at the same step, as calls of the controller do.
        """
        headroom = self._headroom()
        prices = self.prices
        if self._on_trial():
            return self.current
        unpriced = self._without_price()
        self._all_priced = not unpriced
        before = self.current
        if unpriced:
            chosen, why = unpriced[0], f"its price is not known: {self.trial} steps will tell"
        else:
            chosen, why = self._best(headroom, prices)
        if chosen != before or not self.log:
            self.log.append(Decision(self._steps, chosen, headroom, prices, why))
            self._use(chosen)
        self.sampler.table.price = prices.get(chosen)
        return chosen

    def _best(self, headroom: float, prices: Mapping[str, float]) -> tuple[str, str]:
        worth = {name: value for name, value in self.worth(headroom, prices).items() if value == value}
        mine = worth.get(self.current, 0.0)
        best = max(worth, key=lambda name: worth[name])
        said = f"headroom {headroom:.2f}, price {prices[best]:.2f}: worth {worth[best]:.2f} of random's step"
        if best != self.current and worth[best] > (1.0 + self.margin) * max(mine, 1.0):
            return best, f"{best} pays: {said}"
        if self.current != FALLBACK and mine < 1.0:
            return (
                FALLBACK,
                f"{self.current} no longer pays: worth {mine:.2f} of random's step at headroom {headroom:.2f}",
            )
        return self.current, f"no other is worth {1.0 + self.margin:.2f} times as much: {said}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}(current={self.current!r} of {list(self.candidates)}, steps={self._steps})"

    def state_dict(self) -> dict[str, Any]:
        """The candidate in use, the times measured, and the log. Table, sampler and steps have states of their own."""
        return {
            "current": self.current,
            "steps": self._steps,
            "times": {name: list(times) for name, times in self._times.items()},
            "count": dict(self._count),
            "log": [[*decision] for decision in self.log],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        check_entries("state of AutoSelect", state, ("current", "steps", "times", "count", "log"))
        check_entries("the state's times", state["times"], self.candidates)
        check_entries("the state's count", state["count"], self.candidates)
        check_choice("the state's current", state["current"], tuple(self.candidates))
        with reading("state of AutoSelect"):
            steps = check_int("the state's steps", state["steps"], 0)
            count = {name: check_int("the state's count", made, 0) for name, made in state["count"].items()}
            times = {name: [check_number("the state's times", x) for x in of] for name, of in state["times"].items()}
            log = [Decision(*line) for line in state["log"]]
        self._use(state["current"])
        self._times, self._count, self.log = self._kept(times), count, log
        self._steps, self._last = steps, ("", 0.0)
        self._all_priced = not self._without_price()


def _on_gpu(batch: Any) -> bool:
    """Whether a batch, or one of the tensors in a dict, a tuple or a list, is on a GPU: its steps run on the side."""
    if isinstance(batch, Tensor):
        return batch.is_cuda
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return any(map(_on_gpu, values))


def _checked(prices: Mapping[str, float], candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """``prices`` as floats above 0, one for each candidate. Raises TypeError or ValueError."""
    if not isinstance(prices, Mapping) or set(prices) != set(candidates):
        got = sorted(map(str, prices)) if isinstance(prices, Mapping) else shown(prices)
        raise ValueError(f"prices must name the candidates {sorted(candidates)}, got {got}")
    found = {name: check_number(f"the price of {name}", price, 0.0) for name, price in prices.items()}
    if min(found.values()) == 0.0:
        raise ValueError(f"prices must be above 0, got {found}")
    return found
