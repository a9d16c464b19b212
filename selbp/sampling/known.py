"""What a table knows of its samples: the columns to read, what follows from them, and who is probably mislabelled."""

from __future__ import annotations

import math
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor

from selbp._checks import check_int
from selbp.sampling.draw import Columns
from selbp.sampling.record import EPSILON, NORM, NORM_SQ, Averages


class Suspects(NamedTuple):
    """Samples that are probably mislabelled, the surest first.

    Attributes
    ----------
    ids : Tensor
        (n,) int64, the samples' numbers.
    given : Tensor
        (n,) int64, the label that each has.
    probable : Tensor
        (n,) int64, the most probable other one.
    probability : Tensor
        (n,) float32, of being mislabelled.

    See Also
    --------
    selbp.sampling.ScoreTable : its ``suspects`` returns them.

    Examples
    --------
    >>> import torch, selbp
    >>> table = selbp.sampling.ScoreTable(3, classes=2)
    >>> table.fill(torch.arange(3), torch.tensor([[6.0, 0.0]]).repeat(3, 1), torch.tensor([0, 1, 0]))
    >>> found = table.suspects(1)
    >>> found.ids, found.given, found.probable
    (tensor([1]), tensor([1]), tensor([0]))
    """

    ids: Tensor
    given: Tensor
    probable: Tensor
    probability: Tensor


class KnownScores:
    """The columns of a :class:`selbp.sampling.ScoreTable`, and what they say; nothing here writes to them."""

    samples: int
    classes: int | None
    noise: str
    _columns: Columns  # of N + 1 rows: the last one takes what is written of no sample
    _averages: Averages

    @property
    def probability(self) -> Tensor:
        """(N,) float32: p of the given label when the sample was last looked at; NaN where it never was."""
        return self._columns.probability[:-1]

    @property
    def responsibility(self) -> Tensor:
        """(N,) float32: P(the label is right)."""
        return self._columns.responsibility[:-1]

    @property
    def score(self) -> Tensor:
        """(N,) float32: g = r (1 - p)."""
        return self.responsibility * (1.0 - self.probability)

    @property
    def label(self) -> Tensor:
        """(N,) int32: the given label; -1 where it is not known."""
        return self._columns.label[:-1]

    @property
    def rival(self) -> Tensor:
        """(N,) int32: the most probable label that is not the given one; -1 where it is not known."""
        return self._columns.rival[:-1]

    @property
    def seen(self) -> Tensor:
        """(N,) int64: the number of the step that last trained on the sample, from 1; 0: a proxy's score; -1: none."""
        return self._columns.seen[:-1]

    @property
    def epsilon(self) -> Tensor:
        """() float64: the mixture's weight of a label that is any of the C."""
        return self._averages.state[EPSILON]

    @property
    def transition(self) -> Tensor | None:
        """(C, C) float64 P(given | true), a row for each true label; None unless ``noise="class"``."""
        return self._averages.transition

    @property
    def noise_share(self) -> float:
        """Estimated share of wrong labels: eps (C - 1) / C, or the mean of 1 - r of a transition; reads the device."""
        share = float(self.epsilon)
        return share if self.noise != "symmetric" or self.classes is None else share * (self.classes - 1) / self.classes

    @property
    def headroom(self) -> float:
        """mean(g^2) / mean(g)^2 over uniform rows: the batch multiplier that the best unbiased odds could have.

        By 1 + cv^2 of the gradient norms g; NaN before the first row. Choosing can pay only where it exceeds what a
        step costs over random's.
        """
        mean = float(self._averages.state[NORM])
        return float(self._averages.state[NORM_SQ]) / mean**2 if mean > 0 else math.nan

    @property
    def coverage(self) -> float:
        """Share of the samples whose score is the trained network's own."""
        return float((self.seen > 0).double().mean())

    @torch.no_grad()
    def suspects(self, n: int) -> Suspects:
        """The ``n`` samples (fewer where fewer are known) that are most probably mislabelled."""
        n = min(check_int("n", n, 1), self.samples)
        wrong = self._mislabelled()
        order = wrong.nan_to_num(-1.0).sort(descending=True, stable=True).indices
        ids = order[: min(n, int((wrong >= 0).sum()))]
        return Suspects(ids, self.label[ids].long(), self.rival[ids].long(), wrong[ids])

    def _mislabelled(self) -> Tensor:
        """(N,) float32 P(mislabelled); NaN where nothing is known."""
        if self.noise != "symmetric" or self.classes is None:
            return 1.0 - self.responsibility
        p, other = self.probability.double(), self.epsilon / self.classes
        total = (1.0 - self.epsilon) * p + other
        return torch.where(total > 0, other * (1.0 - p) / total, p * 0.0).float()

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a line for each sample: id, given label, p, r, score, P(mislabelled), probable label, last seen.

        What is not known is left empty.
        """
        import csv  # nothing else of the library needs it

        columns = (self.label, self.probability, self.responsibility, self.score, self._mislabelled(), self.rival)
        lists = [column.tolist() for column in (*columns, self.seen)]
        names = "id,label,probability,responsibility,score,mislabelled,probable_label,seen".split(",")
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for number, row in enumerate(zip(*lists, strict=True)):
                writer.writerow([number, *(_cell(x, name) for name, x in zip(names[1:], row, strict=True))])


def _cell(x: int | float, name: str) -> str:
    """An entry as a file for people has it: six digits of a float, nothing where it is not known."""
    if isinstance(x, int):
        return "" if x == -1 and name != "seen" else str(x)
    return "" if x != x else f"{x:.6g}"
