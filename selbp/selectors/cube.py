"""Unbiased matching: balanced random samples, whose mean gradient is nearly the minibatch's every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from selbp._checks import check_choice, check_int
from selbp.ops.choose_gradients import choose_balanced
from selbp.reference.sampling import uniform
from selbp.selectors.base import BaseSelector, Needs
from selbp.selectors.candidates import Candidates
from selbp.types import Selection


@dataclass(frozen=True)
class CubeSampling(BaseSelector):
    """Exactly k rows by the cube method (Deville & Tille 2004), weights 1 / (n pi): unbiased, of low variance.

    The draw is balanced on a sketch of the gradients: their inner products with the mean gradient and with random
    combinations of the minibatch's gradients, which lie mostly along its leading directions. In those directions the
    sample's estimate hardly varies; outside of them it does as that of independent draws.

    Parameters
    ----------
    dimensions : int or None
        Of the sketch, at least 1; None for half of k. More balance leaves less to chance, but the last ``dimensions``
        rows to be decided are not balanced: beyond k / 2 nothing is gained.
    probabilities : {"gradnorm", "uniform"}
        Inclusion probabilities: proportional to the gradient's norm up to 1, or all alike.

    Raises
    ------
    TypeError, ValueError
        For an option of another type, or a value that is not allowed.

    See Also
    --------
    selbp.ops.cube_sample : the draw on its own.
    selbp.GradientMatching : draws nothing; its error is smaller, and it is biased.

    Examples
    --------
    >>> import torch, selbp
    >>> _ = torch.manual_seed(0)
    >>> logits, features, target = torch.randn(16, 3), torch.randn(16, 5), torch.randint(0, 3, (16,))
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target, features)
    >>> proxies = selbp.GradientProxies(selbp.ops.residual(logits, target, stats.lse), features)
    >>> rule = selbp.CubeSampling(probabilities="uniform")
    >>> rule.select(stats, k=4, proxies=proxies, generator=torch.Generator().manual_seed(0)).weights
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    dimensions: int | None = None
    probabilities: Literal["gradnorm", "uniform"] = "gradnorm"

    needs: ClassVar[Needs] = "gradients"

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            object.__setattr__(self, "dimensions", check_int("dimensions", self.dimensions, 1, "an int or None"))
        check_choice("probabilities", self.probabilities, ("gradnorm", "uniform"))

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Draw k balanced rows. Without any gradient the draw is uniform."""
        n, stats, generator = rows.n, rows.stats, rows.generator
        gram = rows.gradients.gram()
        directions = min(self.dimensions or max(1, k // 2), n) - 1
        mixture = torch.randn(n, directions, dtype=torch.float64, device=gram.device, generator=generator)
        draws = uniform(2 * n, gram, generator).view(2, n)
        single = stats.loss.dtype == torch.float32
        indices, weights = choose_balanced(
            gram, stats.valid, mixture, draws, k, self.probabilities == "gradnorm", single
        )
        return Selection(indices, weights.to(stats.loss.dtype))
