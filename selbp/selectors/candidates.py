"""The rows that a rule chooses from, and the choices that rules share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selbp._checks import shown
from selbp.ops.choose_rows import choose_rows
from selbp.reference.sampling import fill_spare, slot_weights
from selbp.selectors.proxies import GradientProxies
from selbp.selectors.weighting import Weights
from selbp.types import BatchStatistics, Selection


@dataclass(eq=False)  # not a NamedTuple, whose properties and methods torch.compile does not trace before torch 2.11
class Candidates:
    """The n rows that :meth:`selbp.BaseSelector.choose` chooses from, and what is known of each.

    Parameters
    ----------
    stats : BatchStatistics
        Losses and gradient norms, (n,) each; ``stats.valid`` are the rows that may be chosen.
    proxies : GradientProxies or None
        The per-sample gradients, where the rule's ``needs`` is ``"gradients"``.
    extras : mapping or None
        What the caller knows of each sample: tensors (n,) by name.
    generator : torch.Generator or None
        Where every draw comes from.
    rule : object
        Who chooses: for messages.

    Raises
    ------
    ValueError
        By ``gradients`` or ``extra``, where the rule was given none.

    See Also
    --------
    selbp.BaseSelector : whose ``choose`` is given them.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> rows = selbp.selectors.Candidates(stats)
    >>> rows.pick(stats.loss, 2)
    Selection(indices=tensor([3, 1]), weights=tensor([0.5000, 0.5000]))
    """

    stats: BatchStatistics
    proxies: GradientProxies | None = None
    extras: Mapping[str, Tensor] | None = None
    generator: torch.Generator | None = None
    rule: object = "a rule"

    @property
    def n(self) -> int:
        """How many rows there are."""
        return self.stats.valid.shape[0]

    @property
    def gradients(self) -> GradientProxies:
        """The ``proxies``. Raises ValueError, or TypeError, where there are none, or of other than n samples."""
        proxies = self.proxies
        if proxies is None:
            raise ValueError(f"{self.rule!r} reads the per-sample gradients: proxies must be given, got None")
        if not isinstance(proxies, GradientProxies):
            raise TypeError(f"proxies must be a selbp.GradientProxies, got {shown(proxies)}")
        if len(proxies.gram()) != self.n:
            raise ValueError(f"proxies must be of the n = {self.n} samples of stats, got {len(proxies.gram())}")
        return proxies

    def extra(self, name: str, meaning: str = "one entry per sample") -> Tensor:
        """(n,) what the caller knows by ``name``. Raises ValueError, or TypeError, where it is not such a tensor."""
        extras = self.extras
        if extras is not None and not isinstance(extras, Mapping):
            raise TypeError(f"extras must be a dict of tensors (n,), got {type(extras).__name__}")
        if extras is None or name not in extras:
            given = [repr(key) for key in extras or () if key.isidentifier()]  # others are the step's own
            got = ", ".join(given) or "none"
            raise ValueError(f"extras must hold {name!r}, {meaning}, got {got}: pass it as step(x, y, {name}=...)")
        found = extras[name]
        if not isinstance(found, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(found).__name__}")
        if found.shape != self.stats.valid.shape:
            raise ValueError(f"{name} must be (n,) = {tuple(self.stats.valid.shape)}, got {tuple(found.shape)}")
        return found

    def pick(
        self, score: Tensor, k: int, by: Literal["top", "odds", "rank"] = "top", weights: Weights = "mean"
    ) -> Selection:
        """K of the valid rows whose ``score`` (n,) is finite, and their weights; spare slots have weight 0.

        Parameters
        ----------
        score : Tensor (n,)
            What the rows are compared by.
        k : int
            How many.
        by : {"top", "odds", "rank"}
            ``"top"``: the greatest scores, the lower index first among equals. ``"odds"``: drawn without replacement,
            with inclusion probabilities proportional to the score, up to 1. ``"rank"``: drawn, with those of
            :class:`selbp.LossRank`.
        weights : {"mean", "batch", "unbiased"}
            ``"mean"`` (1 / k where all rows are valid), ``"batch"`` (1 / n) or, for draws, ``"unbiased"``
            (1 / (n pi), pi the inclusion probability).

        Returns
        -------
        Selection
            k rows and weights of the losses' dtype.
        """
        return choose_rows(
            score,
            self.stats.valid,
            k,
            rule=by,
            weights=weights,
            dtype=self.stats.loss.dtype,
            generator=self.generator,
        )

    def weighted(
        self, indices: Tensor, real: Tensor, weights: Weights = "mean", expected: Tensor | None = None
    ) -> Selection:
        """The rows ``indices`` (k,) with weights; the slots that are not ``real`` (k,) bool repeat a row at weight 0.

        Parameters
        ----------
        indices : Tensor (k,) int64
            Real slots first.
        real : Tensor (k,) bool
            Which slots hold a row that was chosen.
        weights : {"mean", "batch", "unbiased"}
            As in :meth:`pick`.
        expected : Tensor (k,) or None
            For ``"unbiased"``: how often the slot's row is drawn in expectation.

        Returns
        -------
        Selection
            k rows and weights of the losses' dtype.
        """
        indices, real = fill_spare(indices, real, self.stats.valid)
        found = slot_weights(weights, self.stats.valid, real, expected)
        return Selection(indices, found.to(self.stats.loss.dtype))
