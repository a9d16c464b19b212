"""Rules that keep the k rows of greatest score, without chance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from selbp._checks import check_choice, check_number
from selbp.selectors.base import BaseSelector, Needs
from selbp.selectors.candidates import Candidates
from selbp.selectors.weighting import Weights, refit_weights
from selbp.types import Selection, gradient_norm

TARGETS = "targets of a sample"  # the extra that a step adds: no name that a caller may pass


@dataclass(frozen=True)
class _Top(BaseSelector):
    """The k valid rows of greatest score; the lower index first among equals."""

    weights: Weights = "mean"
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        check_choice("weights", self.weights, ("mean", "batch", "refit"))
        object.__setattr__(self, "ridge", check_number("ridge", self.ridge, 0.0))

    def _score(self, rows: Candidates) -> Tensor:
        raise NotImplementedError

    def choose(self, rows: Candidates, k: int) -> Selection:
        """The k valid rows of greatest score; draws nothing."""
        score = self._score(rows)
        if self.weights != "refit":
            return rows.pick(score, k, weights=self.weights)
        indices, weights = rows.pick(score, k, weights="batch")
        return Selection(indices, refit_weights(rows.stats, indices, weights > 0, rows.gradients, self.ridge))


@dataclass(frozen=True)
class TopLoss(_Top):
    """The k rows of greatest loss (online hard example mining, Shrivastava et al. 2016).

    Mislabelled samples have great losses: where there are many, this rule trains on them.

    Parameters
    ----------
    weights : {"mean", "batch", "refit"}
        ``"mean"`` (1 / k), ``"batch"`` (1 / n), or ``"refit"``: the nonnegative least squares weights with which the
        chosen gradients are nearest to the minibatch's mean gradient.
    ridge : float
        For ``"refit"``: added to the diagonal of the Gram matrix, relative to the mean squared gradient norm.
    normalize : {"sample", "tokens"}
        ``"sample"`` compares the sum of a sample's tokens, which long sequences win. ``"tokens"`` compares their mean,
        weighted by class where there are class weights.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.ReducibleLoss : the largest losses above those that any model has.
    selbp.LossRank : draws rows with odds that grow with the loss.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.TopLoss().select(stats, k=2)
    Selection(indices=tensor([3, 1]), weights=tensor([0.5000, 0.5000]))
    """

    normalize: Literal["sample", "tokens"] = field(default="sample", kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalize", self.normalize, ("sample", "tokens"))

    def __repr__(self) -> str:
        per = "" if self.normalize == "sample" else f", normalize={self.normalize!r}"
        return f"TopLoss(weights={self.weights!r}, ridge={self.ridge!r}{per})"

    @property
    def needs(self) -> Needs:
        """``"loss"``, or ``"gradients"`` to refit."""
        return "gradients" if self.weights == "refit" else "loss"

    def _score(self, rows: Candidates) -> Tensor:
        loss = rows.stats.loss
        if self.normalize == "sample":
            return loss
        count = None if rows.extras is None else rows.extras.get(TARGETS)
        if count is None:
            raise ValueError('normalize="tokens" needs what a selbp.SelectiveBackprop knows of the targets')
        return loss / count.to(loss.dtype).clamp(min=torch.finfo(loss.dtype).tiny)


@dataclass(frozen=True)
class TopGradNorm(_Top):
    """The k rows of greatest last-layer gradient norm.

    With ``weights="refit"`` it comes within a few per cent of gradient matching: the baseline that matching has to
    beat.

    Parameters
    ----------
    weights : {"mean", "batch", "refit"}
        As in :class:`selbp.TopLoss`.
    ridge : float
        As in :class:`selbp.TopLoss`.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.TopLoss : reads losses only.
    selbp.GradNormImportance : draws by the norm, without bias.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> selbp.TopGradNorm(weights="batch").select(stats, k=2)
    Selection(indices=tensor([3, 1]), weights=tensor([0.2500, 0.2500]))
    """

    @property
    def needs(self) -> Needs:
        """``"statistics"``, or ``"gradients"`` to refit."""
        return "gradients" if self.weights == "refit" else "statistics"

    def _score(self, rows: Candidates) -> Tensor:
        return gradient_norm(rows.stats)


@dataclass(frozen=True)
class ReducibleLoss(_Top):
    """The k rows of greatest reducible loss ``loss - irreducible`` (RHO-LOSS, Mindermann et al. 2022, equation 3).

    The irreducible loss of a sample is its loss under a model trained on holdout data. The step is given it by name:
    ``step(inputs, target, irreducible_loss=tensor)`` with a tensor (n,) of losses as ``reduction="none"`` gives them,
    class weights included, summed over the tokens of a sequence. A row where it is not finite is not chosen.

    Parameters
    ----------
    weights : {"mean", "batch", "refit"}
        As in :class:`selbp.TopLoss`.
    ridge : float
        As in :class:`selbp.TopLoss`.
    irreducible : str
        The name under which the step is given the tensor.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.TopLoss : the same without irreducible losses.
    selbp.sampling.rho_loss : a table of scores that chooses by reducible losses.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> known = torch.tensor([0.0, 0.0, 0.0, 3.0])  # the last sample is hard for any model
    >>> selbp.ReducibleLoss().select(stats, k=1, extras={"irreducible_loss": known}).indices
    tensor([1])
    """

    irreducible: str = "irreducible_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.irreducible, str) or not self.irreducible:
            raise TypeError(f"irreducible must be the name of a per-sample tensor, got {self.irreducible!r}")

    @property
    def needs(self) -> Needs:
        """``"loss"``, or ``"gradients"`` to refit."""
        return "gradients" if self.weights == "refit" else "loss"

    def _score(self, rows: Candidates) -> Tensor:
        irreducible = rows.extra(self.irreducible, "each sample's irreducible loss")
        return rows.stats.loss - irreducible.to(rows.stats.loss)
