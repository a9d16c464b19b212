"""Rows and weights whose gradients add up to the minibatch's mean gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from selbp._checks import check_choice, check_flag, check_number
from selbp.ops._factors import in_dtype
from selbp.ops.match_gradients import match_gradients
from selbp.ops.match_small import in_one_call, match_small
from selbp.ops.matching import RULES, match
from selbp.reference.sampling import fill_spare
from selbp.selectors.base import BaseSelector, Needs
from selbp.selectors.candidates import Candidates
from selbp.selectors.proxies import GradientProxies
from selbp.types import Selection


@dataclass(frozen=True)
class GradientMatching(BaseSelector):
    """Greedy matching of the mean last-layer gradient, by default with nonnegative weights (arXiv 2312.05021).

    Chooses at most k rows S and weights w that minimise ``||mean - sum_S w_j g_j||^2 + lam ||w||^2``, see
    :func:`selbp.ops.match`. Where no further row lowers the objective, the other slots have weight 0.

    Parameters
    ----------
    rule : {"ols", "normalized", "raw"}
        What a row is chosen by. ``"raw"`` with a ridge is GradMatch (Killamsetty et al. 2021).
    ridge : float
        Relative to the mean squared gradient norm; 0 lets weights explode on trained models.
    nonnegative : bool
        False allows weights below 0.
    weights : {"refit", "mean", "batch"}
        ``"refit"``: the minimising ones. They are not normalised; their sum is well below 1 and scales the step
        (dividing by it undoes the match). Or ``"mean"`` (1 / k) and ``"batch"`` (1 / n) on the same rows.
    unit_sum : float
        Above 0 it adds ``unit_sum * mean(diag K) * (sum w - v / n)^2`` to the objective (v valid rows of n): weights
        that sum to about 1, solved jointly with the match, which gets worse for it.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.ops.match : the solver on its own.
    selbp.CubeSampling : unbiased; matching is not.
    selbp.BackwardCut : matches gradients at a layer of the model.

    Examples
    --------
    >>> import torch, selbp
    >>> _ = torch.manual_seed(0)
    >>> logits, features, target = torch.randn(16, 3), torch.randn(16, 5), torch.randint(0, 3, (16,))
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target, features)
    >>> proxies = selbp.GradientProxies(selbp.ops.residual(logits, target, stats.lse), features)
    >>> chosen = selbp.GradientMatching().select(stats, k=4, proxies=proxies)
    >>> selbp.ops.matching_residual(proxies.residual, features, chosen) < 0.5  # near the minibatch's mean gradient
    tensor(True)
    """

    rule: Literal["ols", "normalized", "raw"] = "ols"
    ridge: float = 1e-3
    nonnegative: bool = True
    weights: Literal["refit", "mean", "batch"] = "refit"
    unit_sum: float = 0.0

    needs: ClassVar[Needs] = "gradients"

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        object.__setattr__(self, "ridge", check_number("ridge", self.ridge, 0.0))
        object.__setattr__(self, "nonnegative", check_flag("nonnegative", self.nonnegative))
        check_choice("weights", self.weights, ("refit", "mean", "batch"))
        object.__setattr__(self, "unit_sum", check_number("unit_sum", self.unit_sum, 0.0))

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Match with k rows; draws nothing."""
        stats, proxies = rows.stats, rows.proxies
        plain = self.weights == "refit" and not self.unit_sum
        factors = proxies.factors() if plain and isinstance(proxies, GradientProxies) else None
        if factors is not None and proxies is not None and factors[0].shape[0] == factors[1].shape[0] == rows.n:
            problem = (*factors, stats.valid, k)
            rule, ridge, nonnegative, bias = self.rule, self.ridge, self.nonnegative, proxies.bias
            if in_one_call(*problem):
                indices, weights = match_small(*problem, bias=bias, rule=rule, ridge=ridge, nonnegative=nonnegative)
            else:
                indices, weights, gram, mean = match_gradients(
                    *problem, bias=bias, rule=rule, ridge=ridge, nonnegative=nonnegative, finite=proxies.finite
                )
                proxies.keep(gram, mean)
            return Selection(indices, in_dtype(weights, stats.loss.dtype))
        return self._in_turn(rows, rows.gradients, k)

    def _in_turn(self, rows: Candidates, proxies: GradientProxies, k: int) -> Selection:
        stats = rows.stats
        gram, mean = proxies.gram(), proxies.mean_gradient()
        inner, target_sq, ridge = mean.inner, mean.target_sq, self.ridge
        if self.unit_sum:
            # (sum w - s)^2 is one more coordinate: 1 in every row, s in the target.
            valid = stats.valid.sum()
            penalty = self.unit_sum * torch.where(stats.valid, gram.diagonal(), 0.0).sum() / valid.clamp(min=1)
            share = valid / rows.n
            gram, inner = gram + penalty, inner + penalty * share
            target_sq = target_sq + penalty * share * share
            ridge = self.ridge / (1.0 + self.unit_sum)  # is relative to a diagonal that has grown
        found = match(
            gram, inner, target_sq, k, rule=self.rule, ridge=ridge, nonnegative=self.nonnegative, valid=stats.valid
        )
        real = found.indices >= 0
        if self.weights != "refit":
            return rows.weighted(found.indices, real, self.weights)
        indices, _ = fill_spare(found.indices, real, stats.valid)
        return Selection(indices, found.weights.to(stats.loss.dtype))  # 0 in the spare slots
