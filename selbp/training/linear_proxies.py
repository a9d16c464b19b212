"""Gradient proxies of a head whose logits are never stored: the residuals of a block of classes at a time.

With z = W h + b, p = softmax(z) and the soft target t = (1 - e) w_y 1_y + (e / C) w of the loss, a token's residual is
r = (sum_c t_c) p - t. Its entries for some classes need the log-sum-exp of all of them, which the loss has found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selbp.common.proxies import BLOCK_BYTES, HeadProxies, with_one
from selbp.types import MeanGradient


class HeadFactors(NamedTuple):
    """What the residuals of n samples of T tokens are made of."""

    features: Tensor  # (n, T, d), of the type in which the head runs
    weight: Tensor  # (C, d)
    bias: Tensor | None  # (C,)
    labels: Tensor  # (n, T)
    lse: Tensor  # (n T,)
    live: Tensor  # (n T,) bool: the tokens that count
    class_weight: Tensor | None  # (C,)
    label_smoothing: float

    def residual(self, first: int, last: int) -> Tensor:
        """(n, T, last - first) the residuals of the classes from ``first`` on, 0 for a token that does not count."""
        classes, smoothing, y = len(self.weight), self.label_smoothing, self.labels.reshape(-1)
        y = torch.where(self.live, y, 0)
        w = self.lse.new_ones(classes) if self.class_weight is None else self.class_weight.to(self.lse.dtype)
        own, spread = (1.0 - smoothing) * w[y], smoothing / classes * w
        part = None if self.bias is None else self.bias[first:last]
        z = torch.nn.functional.linear(self.features, self.weight[first:last], part).flatten(0, 1)
        r = z.to(self.lse.dtype).sub_(self.lse[:, None]).exp_()
        r *= (own + spread.sum())[:, None]
        if smoothing:
            r -= spread[first:last]
        inside = (y >= first) & (y < last)
        entry = torch.where(inside, own, 0.0)
        r.scatter_add_(1, (y - first).clamp(0, r.shape[1] - 1)[:, None], -entry[:, None])
        return r.masked_fill_(~self.live[:, None], 0.0).view(*self.labels.shape, -1)


class StreamedProxies(HeadProxies):
    """The proxies of :class:`HeadProxies`, whose sums over classes are taken a block of them at a time.

    Only a rule that reads ``residual`` itself has it formed as a whole.
    """

    def __init__(
        self,
        factors: HeadFactors,
        scale: Tensor,  # ()
        valid: Tensor,  # (n,) bool
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        live, wide = valid[:, None, None], factors.lse.dtype
        self._classes: int = len(factors.weight)
        self._part: Callable[[int, int], Tensor] | None = lambda first, last: (
            factors.residual(first, last).mul_(scale).masked_fill_(~live, 0.0)  # in place: a block is large
        )
        hidden = torch.where(live & factors.live.view(*factors.labels.shape, 1), factors.features.to(wide), 0.0)
        bias = factors.bias is not None
        length = factors.labels.shape[1]
        part, classes = self._part, self._classes
        super().__init__(lambda: part(0, classes), lambda: hidden, positions=length, bias=bias, reduce=reduce)

    def _blocks(self, features: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first class, residuals (n, T, .)) of all classes, such that a block's gradients fit in some memory."""
        n, length, d = features.shape
        size = max(1, BLOCK_BYTES // (n * max(d, length) * features.element_size()))
        assert self._part is not None
        for first in range(0, self._classes, size):
            yield first, self._part(first, min(first + size, self._classes))

    def norm_sq(self) -> Tensor:
        """(n,) squared norms of the gradients."""
        h = with_one(self.token_features, self.bias)
        n, length, d = h.shape
        if length * (self._classes + d) > self._classes * d:
            found = h.new_zeros(n)
            for _, block in self._blocks(h):
                found += torch.bmm(block.transpose(1, 2), h).square().sum((1, 2))
            return found
        pairs = h.new_zeros(n, length, length)
        for _, block in self._blocks(h):
            pairs.baddbmm_(block, block.transpose(1, 2))
        return (pairs * torch.bmm(h, h.transpose(1, 2))).sum((1, 2)).clamp_(min=0)

    def gram(self) -> Tensor:
        """See :meth:`HeadProxies.gram`."""
        if self._gram is None:
            if self._part is None:
                return super().gram()
            self._run()
        assert self._gram is not None
        return self._gram

    def mean_gradient(self) -> MeanGradient:
        """See :meth:`HeadProxies.mean_gradient`."""
        if self._mean is None:
            if self._part is None:
                return super().mean_gradient()
            self._run()
        assert self._mean is not None
        return self._mean

    def _run(self) -> None:
        """Gram matrix and mean gradient, in one pass over the classes; in two where the mean is that of all ranks."""
        h = with_one(self.token_features, self.bias)
        n, _, d = h.shape
        gram, inner, mean = h.new_zeros(n, n), h.new_zeros(n), h.new_empty(self._classes, d)
        for first, block in self._blocks(h):
            gradients = torch.bmm(block.transpose(1, 2), h)  # (n, ., d)
            mean[first : first + block.shape[-1]] = own = gradients.mean(0)
            flat = gradients.flatten(1)
            gram.addmm_(flat, flat.T)
            inner += flat @ own.flatten()
        if self._reduce is not None:
            mean, inner = self._reduce(mean), h.new_zeros(n)
            for first, block in self._blocks(h):
                inner += ((block @ mean[first : first + block.shape[-1]]) * h).sum((1, 2))
        self._gram = gram
        weight, bias = (mean[:, :-1], mean[:, -1]) if self.bias else (mean, None)
        self._mean = MeanGradient(inner, mean.double().square().sum().to(mean.dtype), weight, bias)

    def release(self) -> None:
        """Let go of the factors."""
        super().release()
        self._part = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_part": None}
