"""Importance sampling by gradient norm: unbiased, with less variance than uniform draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from selbp._checks import check_choice, check_flag, check_number
from selbp.ops._factors import in_dtype
from selbp.ops.choose_gradients import choose_by_norm
from selbp.reference.choices import norm_odds
from selbp.reference.sampling import sample_with_replacement, slot_weights, uniform
from selbp.selectors.base import BaseSelector, Needs, check_state, state_tensor
from selbp.selectors.candidates import Candidates
from selbp.selectors.weighting import Weights
from selbp.types import Selection


@dataclass(eq=False)
class GradNormImportance(BaseSelector):
    """Rows drawn with odds proportional to their gradient norm (Katharopoulos & Fleuret 2018).

    Parameters
    ----------
    norm : {"residual", "gradient"}
        ``"residual"``: the norm of the gradient with respect to the logits, the source's score. ``"gradient"``: that
        of the last layer's weights and bias.
    weights : {"unbiased", "mean", "batch"}
        ``"unbiased"``: E[sum w g] = (1/n) sum g. Or ``"mean"`` (1 / k), ``"batch"`` (1 / n).
    replacement : bool
        False: exactly k distinct rows at inclusion probabilities ``pi_i = min(1, c q_i)``, w = 1 / (n pi). True: k
        independent draws, w = 1 / (n k q), as in the source; rows may come twice. (Weights 1 / (n k q) on sequential
        draws without replacement, as often seen, are biased.)
    threshold : float, "recompute", "rows" or None
        Sample by norm only while the running mean of ``tau = (1 - |q - u|^2 / |q|^2)^(-1/2)``, u uniform, exceeds this
        (the source's equation 26: the draws are worth those of a batch tau times as large); uniformly otherwise.
        ``"recompute"`` and ``"rows"`` stand for the break-even of a step that scores every row and trains on f = k / n
        of them, (1 + 3f) / 3f and (1 + 2f) / 3f. None: always by norm.
    momentum : float
        In [0, 1], of the running mean of tau, which starts at 0.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.TopGradNorm : takes the greatest norms, without chance.
    selbp.CubeSampling : draws by the norm as well, and balances the sample.

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> chosen = selbp.GradNormImportance().select(stats, k=2, generator=torch.Generator().manual_seed(0))
    >>> chosen.indices.shape, bool((chosen.weights > 0).all())
    (torch.Size([2]), True)
    """

    norm: Literal["residual", "gradient"] = "residual"
    weights: Weights = "unbiased"
    replacement: bool = False
    threshold: float | Literal["recompute", "rows"] | None = None
    momentum: float = 0.9
    _tau: Tensor | None = field(default=None, init=False, repr=False)  # () float64

    needs: ClassVar[Needs] = "statistics"
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("residual", "gradient"))
        check_choice("weights", self.weights, ("unbiased", "mean", "batch"))
        self.replacement = check_flag("replacement", self.replacement)
        if isinstance(self.threshold, str):
            check_choice("threshold", self.threshold, ("recompute", "rows"))
        elif self.threshold is not None:
            self.threshold = check_number("threshold", self.threshold, 0.0)
        self.momentum = check_number("momentum", self.momentum, 0.0, 1.0)

    @property
    def tau(self) -> Tensor:
        """() float64 running mean of tau; 0 before the first batch."""
        return torch.zeros((), dtype=torch.float64, device="cpu") if self._tau is None else self._tau.clone()

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Draw k rows by their gradients' norms. Without any gradient the draw is uniform."""
        stats, generator = rows.stats, rows.generator
        feature_sq = stats.feature_sq if self.norm == "gradient" else None
        tau = (self.tau if self._tau is None else self._tau).to(stats.valid.device)
        threshold = self._least_tau(k / rows.n)
        if self.replacement:
            odds, tau = norm_odds(stats.residual_sq, feature_sq, stats.valid, tau, self.momentum, threshold)
            self._remember(tau)
            indices, real, chance = sample_with_replacement(odds, k, generator)
            return Selection(indices, slot_weights(self.weights, stats.valid, real, k * chance).to(stats.loss.dtype))
        indices, weights, tau = choose_by_norm(
            stats.residual_sq,
            feature_sq,
            stats.valid,
            uniform(rows.n + 1, stats.valid, generator),
            tau,
            k,
            self.weights,
            self.momentum,
            threshold,
            stats.loss.dtype == torch.float32,
        )
        self._remember(tau)
        return Selection(indices, in_dtype(weights, stats.loss.dtype))

    def _remember(self, tau: Tensor) -> None:
        """Write ``tau`` to the memory that held the one before, where the replays of a captured graph read it."""
        if self._tau is None or self._tau.device != tau.device or self._tau.is_inference():
            self._tau = tau
        else:
            self._tau.copy_(tau)

    def _least_tau(self, keep: float) -> float | None:
        """What the running mean of tau must exceed for draws by norm; None for always."""
        if isinstance(self.threshold, str):
            return (1.0 + (3.0 if self.threshold == "recompute" else 2.0) * keep) / (3.0 * keep)
        return self.threshold

    def state_dict(self) -> dict[str, Any]:
        """``tau`` () float64."""
        return {"tau": self.tau}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`."""
        check_state(self, state, ("tau",))
        tau = state_tensor(state, "tau", ())
        self._remember(tau if self._tau is None else tau.to(self._tau.device))
