"""The table of scores: what the steps of a training tell of each sample of a data set, at no further cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from selbp._checks import check_choice, check_int, check_number
from selbp.sampling.draw import Columns, Odds, odds_of
from selbp.sampling.issued import Draw, Issued, check_ids
from selbp.sampling.noise import estimate_epsilon, estimate_transition, normalised
from selbp.sampling.record import (
    EPSILON,
    FEW,
    LEAST_EPSILON,
    MASS,
    NORM,
    NORM_SQ,
    Averages,
    Fresh,
    lower_bound,
    record,
    responsibility,
)
from selbp.sampling.table_state import restore, saved
from selbp.sampling.written import WrittenScores, check_rows

FIRST_EPSILON = 0.1  # before anything is known
NoiseModel = Literal["auto", "symmetric", "class", "none"]


class ScoreTable(WrittenScores):
    """What is known of each of N samples: the probability p of its label, and how far that label is believed.

    A proxy fills it (:func:`selbp.sampling.fit_proxy`), every row that trains writes its fresh p back
    (``table=`` of :class:`selbp.SelectiveBackprop`), and :class:`selbp.sampling.ScoredBatchSampler` draws by it. With
    the responsibility r = P(label right | p) of a mixture, (1 - eps) p / ((1 - eps) p + eps / C), a sample's score is
    g = r (1 - p), the size of its gradient in the noise-aware loss. eps is estimated by expectation-maximisation: on
    the proxy's scan, then from the rows that were drawn uniformly only, since on rows chosen for r it would fall to 0.

    Parameters
    ----------
    samples : int
        N, the length of the data set.
    classes : int or None
        C. None for targets that are no classes: then p = exp(-loss), and every label is believed. The loss is the mean
        over a sequence's targets that are not ignored, or a loss of one's own as it is.
    noise : {"symmetric", "class", "none", "auto"}
        ``"symmetric"``, a wrong label is any with the same chance; ``"class"``, a transition matrix (C, C) is learned,
        for few classes; ``"none"``, every label is believed. ``"auto"`` is symmetric until a proxy finds a class whose
        surest samples are often labelled as another one; the attribute ``noise`` then says ``"class"``.
    balance : float or None
        None: odds as they are. b in [0, 1]: the odds of a class's samples together are in proportion to (its number of
        samples)^(1 - b), and scores rank within classes only. 0 leaves classes as frequent as they are, however hard; 1
        makes them equally frequent.
    window : int
        How many uniform rows the averages remember.
    device : torch.device or str
        Where the table lives. On the CPU it serves a model on any device: what a GPU saw is written when it has
        arrived, a few steps later, and nothing waits for it. On a GPU draws are tensors there, for data that is in its
        memory.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong type or out of range.

    See Also
    --------
    selbp.sampling.fit_proxy : fills a table before the first step.
    selbp.sampling.ScoredBatchSampler : draws by it.

    Examples
    --------
    >>> table = ScoreTable(4, classes=2)
    >>> table.fill(torch.arange(2), torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    >>> table.probability
    tensor([0.9820, 0.5000,    nan,    nan])
    """

    def __init__(
        self,
        samples: int,
        classes: int | None = None,
        *,
        noise: NoiseModel = "symmetric",
        balance: float | None = None,
        window: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        self.samples = check_int("samples", samples, 1)
        self.classes = None if classes is None else check_int("classes", classes, 2)
        check_choice("noise", noise, ("auto", "symmetric", "class", "none"))
        if self.classes is None and noise == "class":
            raise ValueError('noise="class" needs classes=, the number of classes')
        if self.classes is None and balance is not None:
            raise ValueError("balance needs classes=, the number of classes")
        self.adaptive = noise == "auto" and self.classes is not None  # whether a proxy may make it "class"
        self.noise: NoiseModel = "none" if self.classes is None else "symmetric" if noise == "auto" else noise
        self.balance = None if balance is None else check_number("balance", balance, 0.0, 1.0)
        self.window = check_int("window", window, 1)
        self.device = torch.device(device)
        n = self.samples + 1
        self._columns = Columns(
            torch.full((n,), torch.nan, dtype=torch.float32, device=self.device),
            torch.full((n,), torch.nan, dtype=torch.float32, device=self.device),
            torch.full((n,), -1, dtype=torch.int32, device=self.device),
            torch.full((n,), -1, dtype=torch.int32, device=self.device),
            torch.full((n,), -1, dtype=torch.int64, device=self.device),
        )
        self._averages = Averages(torch.zeros(4, dtype=torch.float64, device=self.device), None, None, self.window)
        self._become(self.noise)
        if self.noise != "none":
            self._averages.state[EPSILON] = FIRST_EPSILON
        self._time, self._prior, self._arriving = 0, 1.0, []
        self.issued = Issued()
        self.irreducible: Tensor | None = None  # (N,) float32, see selbp.sampling.rho_loss
        self.price: float | None = None  # see selbp.AutoSelect

    def _become(self, noise: NoiseModel) -> None:
        """Take labels to be wrong as ``noise`` says; a transition begins with a first guess."""
        self.noise, matrix, counts = noise, None, None
        if noise == "class":
            classes = self._require_classes()
            counts = torch.full((classes, classes), FIRST_EPSILON, dtype=torch.float64, device=self.device)
            counts = normalised(counts / classes, 1.0 - FIRST_EPSILON) / classes
            matrix = normalised(counts, 0.0)
        self._averages = Averages(self._averages.state, matrix, counts, self.window)

    def __len__(self) -> int:
        return self.samples

    def __repr__(self) -> str:
        return f"ScoreTable({self.samples}, classes={self.classes}, noise={self.noise!r}, balance={self.balance})"

    # ----------------------------------------------------------------------------------------------- what it knows

    @property
    def shown_epsilon(self) -> Tensor | float:
        """The eps that a loss should use: the estimate once uniform rows show that labels are wrong, else 0.

        They show it if the lower 99 % bound of eps is above .05. The bound takes each row's responsibility for an
        observation, and leaves the first guess out. Below .05 the result is 0: a network on clean data is sure of some
        wrong samples too, and a loss that believed it would learn nothing from them. It is 0 as well if a proxy found a
        transition, because networks trained by that transition diverged. The result is a number if the table is on the
        CPU. On a GPU it is :attr:`epsilon`, () float64, without a test: a test would wait for the device.
        """
        if self.adaptive and self.noise == "class":
            return 0.0
        if self.device.type != "cpu" or torch.compiler.is_compiling():
            return self.epsilon
        epsilon, rows = self._averages.state[: MASS + 1].tolist()
        seen = epsilon - self._prior * FIRST_EPSILON
        return epsilon if seen > FEW and lower_bound(seen, rows * (1.0 - self._prior)) > FEW else 0.0

    # ------------------------------------------------------------------------------------------------- what is written

    @torch.no_grad()
    def fill(self, ids: Tensor, logits: Tensor, target: Tensor) -> None:
        """Write a proxy's scores: ``logits`` (n, C) of samples ``ids`` (n,) with labels ``target`` (n,) int64.

        They count as not trained on (``seen`` 0), and change no average: call :meth:`estimate` after the last ones.
        """
        classes = self._require_classes()
        self.arrive(wait=True)  # else what a GPU has sent before would be written after it
        ids = check_ids(ids, len(ids), self.samples, self.device)
        check_rows(logits, target, len(ids), classes)
        fresh = Fresh(ids, 0, None, None, target.to(self.device))
        self._raise_mismatch(record(self._columns, self._averages, fresh, logits.float().to(self.device), 0), fresh)

    @torch.no_grad()
    def estimate(self, logits: Tensor | None = None, target: Tensor | None = None) -> None:
        """Estimate the noise as a proxy's scan tells it, and :meth:`measure` the scores there are.

        ``noise="symmetric"`` reads the probabilities in the table, of all samples or of uniform ones: fill it first.
        ``"class"`` reads what it is given, for all probabilities of a sample count: fill the table afterwards, for
        responsibilities by the transition that was found, and measure again.

        Parameters
        ----------
        logits : Tensor (m, C) or None
            Of samples drawn uniformly, for ``noise="class"``.
        target : Tensor (m,) int64 or None
            Their labels.

        Raises
        ------
        ValueError
            There is nothing to estimate from, or the shapes do not fit.
        """
        if self.noise == "symmetric":
            known = self.probability[torch.isfinite(self.probability)]
            if not len(known):
                raise ValueError("the table holds no score yet: fill it first")
            found = estimate_epsilon(known, self._require_classes(), self.epsilon)
            self.epsilon.copy_(found.clamp(min=LEAST_EPSILON))
            self.refresh()
        elif self.noise == "class":
            if logits is None or target is None:
                raise ValueError('noise="class" learns from logits (m, C) and target (m,): both must be given')
            check_rows(logits, target, len(target), self._require_classes())
            transition, counts = estimate_transition(torch.softmax(logits.double(), 1), target)
            assert self._averages.transition is not None and self._averages.counts is not None
            self._averages.transition.copy_(transition)
            self._averages.counts.copy_(counts)
        self._prior = 0.0
        self.measure()

    @torch.no_grad()
    def _believe(self, transition: Tensor, target: Tensor) -> None:
        """Take labels to be wrong as ``transition`` (C, C) says, from ``target`` (m,), labels of uniform samples.

        The table is ``noise="class"`` from then on. Scores stay as they are: fill and :meth:`measure` afterwards.
        """
        self._become("class")
        assert self._averages.transition is not None and self._averages.counts is not None
        given = torch.bincount(target, minlength=len(transition)).to(transition) / max(1, len(target))
        true = (given @ torch.linalg.inv(transition)).clamp(min=0.0)
        self._averages.transition.copy_(transition)
        self._averages.counts.copy_(true[:, None] * transition)
        self._prior = 0.0

    @torch.no_grad()
    def measure(self) -> None:
        """Take headroom, and a transition's share of wrong labels, from all scores there are."""
        known = torch.isfinite(self.probability)
        r, p = self.responsibility[known].double(), self.probability[known].double()
        if not len(p):
            return
        state, norm = self._averages.state, r * (1.0 - p)
        if self.noise == "class":
            state[EPSILON] = (1.0 - r).mean()
        state[MASS], state[NORM], state[NORM_SQ] = min(self.window, len(p)), norm.mean(), norm.square().mean()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give all samples the responsibility that today's eps gives their p; a sampler does so at each epoch's start.

        A transition needs all probabilities of a sample: there responsibilities stay as they were written.
        """
        self.arrive(wait=False)
        if self.noise == "symmetric" and self.classes is not None:
            p = self.probability.double()
            self.responsibility.copy_(responsibility(p, self.epsilon, self.classes))

    @torch.no_grad()
    def forget(self, ids: Tensor) -> None:
        """Drop all that is known of the samples ``ids`` (n,), as after their labels were corrected."""
        self.arrive(wait=True)  # else what a GPU has sent before would be written after it
        ids = check_ids(ids, len(ids), self.samples, self.device)
        for column, value in zip(self._columns, (torch.nan, torch.nan, -1, -1, -1), strict=True):
            column[ids] = value

    def next(self, n: int, ids: Any = None) -> Draw:
        """The samples of the batch of ``n`` that a step is given: ``ids``, else what the sampler handed out next.

        Rows whose numbers are passed count as drawn uniformly, unless a sampler of this table is in use.
        """
        if ids is None:
            draw = self.issued.front(n)
            assert draw is not None
            return draw
        ids = check_ids(ids, n, self.samples, self.device)
        return self.issued.front(n, ids) or Draw(ids, 0 if self.issued.in_use else n)

    @torch.no_grad()
    def class_factor(self, odds: Odds) -> Tensor | None:
        """(C,) float64 by which ``balance`` multiplies the odds of each class; None without it."""
        if self.balance is None or self.classes is None:
            return None
        value = odds_of(self._columns, torch.arange(self.samples, device=self.device), Odds(odds.power, 0.0), None)
        label = self.label.long()
        known, slot = label >= 0, label.clamp(min=0)
        sums, sizes = (torch.zeros(self.classes, dtype=torch.float64, device=self.device) for _ in range(2))
        sums.index_add_(0, slot, torch.where(known, value, 0.0))
        sizes.index_add_(0, slot, known.double())
        wanted = torch.where(sizes > 0, sizes.pow(1.0 - self.balance), 0.0)
        factor = torch.where(sums > 0, wanted / sums, 0.0)
        total = (factor * sums).sum()
        return torch.where(total > 0, factor * sums.sum() / total, 1.0)

    # ---------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learned, on the CPU; waits for what is still on its way."""
        self.arrive(wait=True)
        return saved(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        restore(self, self.state_dict(), state)
