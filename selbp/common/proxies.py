"""Gradient proxies of samples that have several positions each: g_i = sum_t r_it (x) [h_it, 1], exactly.

Also where the mean gradient M becomes that of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from selbp import ops
from selbp.selectors import GradientProxies
from selbp.types import MeanGradient, Selection

BLOCK_BYTES = 64 << 20  # of intermediate results that hold one block of classes or of token pairs

DIAGNOSTIC_BYTES = 32 << 20  # of residual and features kept for the report of a rule that does not read them


def with_one(features: Tensor, bias: bool) -> Tensor:
    """``features`` (..., d) with a 1 at the end for the bias, if there is a ``bias``."""
    return torch.cat([features, features.new_ones(*features.shape[:-1], 1)], -1) if bias else features


def _class_blocks(residual: Tensor, features: Tensor) -> list[Tensor]:
    """The class axis of ``residual`` (n, T, C) in slices whose gradients fit in a block."""
    n, _, d = features.shape
    size = max(1, BLOCK_BYTES // (n * d * residual.element_size()))
    return list(residual.split(size, -1))


def sequence_gram(residual: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    """(n, n) inner products of g_i = sum_t r_it (x) [h_it, 1], for residual (n, T, C) and features (n, T, d).

    Either over pairs of tokens, (nT)^2 (C + d) products, or by forming the gradients of a block of classes at a time,
    (nT + n^2) C d: whichever is cheaper. Memory beside the result is bounded either way.
    """
    features = with_one(features, bias)
    n, length, d = features.shape
    classes = residual.shape[-1]
    gram = residual.new_zeros(n, n)
    if (n * length) ** 2 * (classes + d) > (n * length + n * n) * classes * d:
        for block in _class_blocks(residual, features):
            gradient = torch.bmm(block.transpose(1, 2), features).flatten(1)
            gram.addmm_(gradient, gradient.T)
        return gram
    flat_residual, flat_features = residual.flatten(0, 1), features.flatten(0, 1)
    size = max(1, BLOCK_BYTES // (n * length * length * residual.element_size()))
    for start in range(0, n, size):
        rows = slice(start * length, (start + size) * length)
        pairs = (flat_residual[rows] @ flat_residual.T).mul_(flat_features[rows] @ flat_features.T)
        gram[start : start + size] = pairs.view(-1, length, n, length).sum((1, 3))
    return gram


def sequence_norm_sq(residual: Tensor, features: Tensor, *, bias: bool = True) -> Tensor:
    """(n,) squared norms of g_i = sum_t r_it (x) [h_it, 1]: the diagonal of :func:`sequence_gram`."""
    features = with_one(features, bias)
    _, length, d = features.shape
    if length * (residual.shape[-1] + d) > residual.shape[-1] * d:
        blocks = _class_blocks(residual, features)
        return torch.stack([torch.bmm(b.transpose(1, 2), features).square().sum((1, 2)) for b in blocks]).sum(0)
    pairs = torch.bmm(residual, residual.transpose(1, 2)) * torch.bmm(features, features.transpose(1, 2))
    return pairs.sum((1, 2)).clamp_(min=0)


def residual_of_gram(selection: Selection, gram: Tensor, inner: Tensor, target_sq: Tensor) -> Tensor:
    """() float64 ``||M - sum_j w_j g_j|| / ||M||`` from ``gram`` (n, n), ``inner`` (n,) <g_i, M> and () ``||M||^2``."""
    w, rows, target_sq = selection.weights.double(), selection.indices, target_sq.double()
    error = target_sq - 2 * w @ inner[rows].double() + w @ gram[rows][:, rows].double() @ w
    return (error.clamp(min=0) / target_sq).sqrt()


class HeadProxies(GradientProxies):
    """Proxies from the head's factors per position: residual (n, T, C), features (n, T, d).

    With one position per sample these are the plain proxies. With more, :meth:`gram` and :meth:`mean_gradient` are
    exact for the summed gradients, while ``residual`` and ``features``, which have one row per sample, are the sum of
    the residuals and the mean of the features. ``reduce`` averages the mean gradient over ranks in place.
    ``finite`` says that no factor holds a NaN or an infinity.
    """

    def __init__(
        self,
        residual: Callable[[], Tensor],  # () -> (n, T, C), or (n, C) where T is 1; 0 where a sample is not valid
        features: Callable[[], Tensor],  # () -> (n, T, d), or (n, d); finite
        *,
        positions: int,  # T
        bias: bool = True,
        reduce: Callable[[Tensor], Tensor] | None = None,
        finite: bool = False,
    ) -> None:
        super().__init__(residual, features, bias=bias)  # the base's factors are the pooled ones, below
        self._factors: tuple[Callable[[], Tensor], Callable[[], Tensor]] | None = (residual, features)
        self.positions, self._reduce, self.finite = positions, reduce, finite

    def _factor(self, which: int) -> Tensor:
        if self._factors is None:
            raise RuntimeError("the factors of these proxies have been released")
        return self._factors[which]()

    def __getstate__(self) -> dict[str, Any]:
        """With the factors computed, unless they have been released: what computes them may be a closure."""
        known: dict[str, Any] = {"_residual": None, "_features": None, "_factors": None}
        if self._factors is not None:
            known |= {"_left": self._left, "_right": self._right}
        return {**self.__dict__, **known}

    @cached_property
    def residual(self) -> Tensor:
        """(n, C) summed over positions."""
        return self.token_residual.sum(1)

    @cached_property
    def features(self) -> Tensor:
        """(n, d) averaged over positions."""
        return self.token_features.mean(1)

    @cached_property
    def _left(self) -> Tensor:
        return self._factor(0)

    @cached_property
    def _right(self) -> Tensor:
        return self._factor(1)

    @property
    def token_residual(self) -> Tensor:
        """(n, T, C)."""
        return self._left if self._left.dim() == 3 else self._left.unsqueeze(1)

    @property
    def token_features(self) -> Tensor:
        """(n, T, d)."""
        return self._right if self._right.dim() == 3 else self._right.unsqueeze(1)

    @property
    def flat(self) -> tuple[Tensor, Tensor]:
        """Residual (n T, C) and features (n T, d)."""
        left, right = self._left, self._right
        return left if left.dim() == 2 else left.flatten(0, 1), right if right.dim() == 2 else right.flatten(0, 1)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """See :meth:`GradientProxies.factors`; None for several positions, or where M is that of all ranks."""
        known = self._gram is not None or self._mean is not None
        plain = self.positions == 1 and self._reduce is None and type(self) is HeadProxies
        return self.flat if plain and not known else None

    def gram(self) -> Tensor:
        """See :meth:`GradientProxies.gram`."""
        if self._gram is None:
            if self.positions == 1:
                self._gram = ops.gradient_gram(*self.flat, bias=self.bias)
            else:
                self._gram = sequence_gram(self.token_residual, self.token_features, bias=self.bias)
        return self._gram

    def mean_gradient(self) -> MeanGradient:
        """See :meth:`GradientProxies.mean_gradient`; over all ranks where ``reduce`` was given."""
        if self._mean is None:
            residual, features = self.flat
            length = self.positions
            inner, target_sq, weight, bias = ops.mean_gradient(residual, features, bias=self.bias)
            if length > 1:
                inner, target_sq = inner.view(-1, length).sum(1) * length, target_sq * length**2
                weight, bias = weight * length, None if bias is None else bias * length
            if self._reduce is not None:
                weight = self._reduce(weight)
                inner, target_sq = ((residual @ weight) * features).sum(1), weight.double().square().sum()
                if bias is not None:
                    bias = self._reduce(bias)
                    inner, target_sq = inner + residual @ bias, target_sq + bias.double().square().sum()
                inner, target_sq = inner.view(-1, length).sum(1), target_sq.to(weight.dtype)
            self._mean = MeanGradient(inner, target_sq, weight, bias)
        return self._mean

    def matching_residual(self, selection: Selection) -> Tensor:
        """() ``||M - sum_j w_j g_j|| / ||M||``: from the Gram matrix where it is known, else from the factors.

        The Gram's quadratic form has a floor of about 3e-4 in float32; the factors' is exact to float64.
        """
        if self._gram is not None or self._reduce is not None:
            return residual_of_gram(selection, self.gram(), *self.mean_gradient()[:2])
        w, rows = selection.weights.double(), selection.indices
        length = self.positions
        tokens = (rows[:, None] * length + torch.arange(length, device=rows.device)).flatten()
        spread = Selection(tokens, (w / length).repeat_interleave(length, output_size=len(w) * length))
        return ops.matching_residual(*self.flat, spread, bias=self.bias)

    def times(self, factor: Tensor) -> HeadProxies:
        """Proxies of the gradients times ``factor`` (n,), computed where they are read."""

        def left() -> Tensor:
            residual = self.token_residual
            return residual * factor.to(residual)[:, None, None]

        return HeadProxies(
            left, lambda: self.token_features, positions=self.positions, bias=self.bias, reduce=self._reduce
        )

    def release(self) -> None:
        """Let go of the factors."""
        self._factors = None
        for name in ("residual", "features", "_left", "_right"):
            self.__dict__.pop(name, None)

    @property
    def unmet(self) -> bool:
        """Whether to read the mean gradient, which is that of all ranks, would wait for the other ranks."""
        return self._reduce is not None and self._mean is None

    @property
    def complete(self) -> bool:
        """Whether the Gram matrix and the mean gradient are known: then the factors are no longer needed."""
        return self._gram is not None and self._mean is not None
