"""Rules that were tried and are not offered: a study names them, the library does not export them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from selbp._checks import check_int, check_number, check_optional_tensor, reading
from selbp.ops.matching import match
from selbp.ops.mean_gradient import mean_gradient
from selbp.reference.sampling import fill_spare
from selbp.selectors import BaseSelector, Candidates, Needs
from selbp.selectors.base import check_state
from selbp.types import Selection


class AveragedTarget(BaseSelector):
    """Nonnegative matching of an exponential average of the minibatches' mean gradients, instead of this one's.

    The average is ``T <- decay T + (1 - decay) M``, divided by ``1 - decay^t`` as Adam's is, of gradients in units of
    their root mean square. One minibatch's mean is a noisy target; the average is steadier, and lags behind the
    weights. For layers with a bias.

    Args:
        decay: in [0, 1); 0 is :class:`selbp.GradientMatching`.
        ridge: relative to the mean squared gradient norm.
    """

    needs: ClassVar[Needs] = "gradients"

    def __init__(self, decay: float = 0.9, ridge: float = 1e-3) -> None:
        check_number("decay", decay, 0.0)
        if decay >= 1:
            raise ValueError(f"decay must be below 1, got {decay}")
        check_number("ridge", ridge, 0.0)
        self.decay, self.ridge = decay, ridge
        self._average: Tensor | None = None  # (C, d + 1) the head's weight and bias side by side
        self._steps = 0

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Match the average with k rows; draws nothing."""
        proxies = rows.gradients
        gram = proxies.gram()
        scale = gram.diagonal().mean().sqrt().clamp(min=torch.finfo(gram.dtype).tiny)  # a cut's gradients have no unit
        mean = mean_gradient(proxies.residual, proxies.features, bias=True)
        assert mean.head_bias is not None
        now = torch.cat([mean.head_weight, mean.head_bias[:, None]], 1) / scale
        before = torch.zeros_like(now) if self._average is None else self._average
        self._average = before.lerp(now, 1.0 - self.decay)
        self._steps += 1
        target = self._average * (scale / (1.0 - self.decay**self._steps))
        weight, offset = target[:, :-1], target[:, -1]
        residual = proxies.residual.to(target.dtype)
        inner = ((residual @ weight) * proxies.features.to(target.dtype)).sum(1) + residual @ offset
        found = match(gram, inner, target.square().sum(), k, ridge=self.ridge, valid=rows.stats.valid)
        indices, _ = fill_spare(found.indices, found.indices >= 0, rows.stats.valid)
        return Selection(indices, found.weights.to(rows.stats.loss.dtype))

    def state_dict(self) -> dict[str, Any]:
        """The average and how many minibatches are in it."""
        return {"average": self._average, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        check_state(self, state, ("average", "steps"))
        with reading("state of AveragedTarget"):
            check_optional_tensor("the state's average", state["average"])
            steps = check_int("the state's steps", state["steps"], 0)
        self._average, self._steps = state["average"], steps
