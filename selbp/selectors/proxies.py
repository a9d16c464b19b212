"""The per-sample last-layer gradients, as two factors that are computed only when a rule reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from selbp.ops.gram import gradient_gram
from selbp.ops.mean_gradient import mean_gradient
from selbp.types import MeanGradient


class GradientProxies:
    """g_i = residual_i (x) [features_i, 1] of n samples, never materialised; everything is computed at most once.

    Parameters
    ----------
    residual : Tensor or callable
        (n, C) gradient of each loss with respect to the logits, or a function that computes it.
    features : Tensor or callable
        (n, d) input of the head, or a function that computes it.
    bias : bool
        Whether the head has a bias (the 1 above).

    See Also
    --------
    selbp.selectors.Candidates : hands the proxies to a rule as ``gradients``.
    selbp.ops.gradient_gram : the inner products.
    selbp.ops.mean_gradient : the mean and its inner products.

    Examples
    --------
    >>> import torch, selbp
    >>> _ = torch.manual_seed(0)
    >>> logits, features, target = torch.randn(16, 3), torch.randn(16, 5), torch.randint(0, 3, (16,))
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target, features)
    >>> proxies = selbp.GradientProxies(selbp.ops.residual(logits, target, stats.lse), features)
    >>> proxies.gram().shape, proxies.mean_gradient().head_weight.shape
    (torch.Size([16, 16]), torch.Size([3, 5]))
    """

    finite = False  # True: no factor holds a NaN or an infinity. False: nobody has looked

    def __init__(
        self, residual: Tensor | Callable[[], Tensor], features: Tensor | Callable[[], Tensor], *, bias: bool = True
    ) -> None:
        self._residual, self._features, self.bias = residual, features, bias
        self._gram: Tensor | None = None
        self._mean: MeanGradient | None = None

    def __getstate__(self) -> dict[str, Any]:
        """With both factors computed: what computes them may be a closure, which does not pickle."""
        return {**self.__dict__, "_residual": self.residual, "_features": self.features}

    @property
    def residual(self) -> Tensor:
        """(n, C)."""
        if not isinstance(self._residual, Tensor):
            self._residual = self._residual()
        return self._residual

    @property
    def features(self) -> Tensor:
        """(n, d)."""
        if not isinstance(self._features, Tensor):
            self._features = self._features()
        return self._features

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``residual`` (n, C) and ``features`` (n, d), for an operator that computes everything of them at once.

        None where the Gram matrix or the mean gradient is known already, and of a subclass, whose own may differ.
        """
        known = self._gram is not None or self._mean is not None
        return None if known or type(self) is not GradientProxies else (self.residual, self.features)

    def keep(self, gram: Tensor, mean: MeanGradient) -> None:
        """Take what :meth:`gram` (n, n) and :meth:`mean_gradient` return from now on, computed from :meth:`factors`."""
        self._gram, self._mean = gram, mean

    def gram(self) -> Tensor:
        """(n, n) inner products g_i . g_j; see :func:`selbp.ops.gradient_gram`."""
        if self._gram is None:
            self._gram = gradient_gram(self.residual, self.features, bias=self.bias)
        return self._gram

    def mean_gradient(self) -> MeanGradient:
        """The mean gradient and its inner products g_i . M; see :func:`selbp.ops.mean_gradient`."""
        if self._mean is None:
            self._mean = mean_gradient(self.residual, self.features, bias=self.bias)
        return self._mean
