"""What a selector reads at a cut: the gradient of each sample there, and the activation.

The layer below the cut has the gradient g_i = sum_t delta_it (x) a_it. Here delta is the gradient at the cut, a the
layer's input, and t runs over the positions of a sample (steps, pixels). If a is not given, the activation at the cut
stands for it. There are three ways to compare samples, from cheap to exact:

* ``"pooled"``: (sum_t delta_it) (x) [mean_t a_it, 1], one position per sample;
* ``"flat"``: all positions and channels as one vector, K = (delta delta') * (a a' + 1);
* ``"positions"``: the sum over positions exactly, at a cost that grows with their number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selbp.common.proxies import HeadProxies, residual_of_gram, sequence_norm_sq
from selbp.selectors import GradientProxies
from selbp.types import BatchStatistics, MeanGradient, Selection, real_dtype

Proxy = Literal["pooled", "flat", "positions"]


class FlatProxies(GradientProxies):
    """Proxies with one position per sample whose mean gradient is too large to form. The Gram matrix replaces it."""

    def mean_gradient(self) -> MeanGradient:
        """Return the mean's inner products and norm; the mean itself is an empty tensor."""
        if self._mean is None:
            inner = self.gram().double().mean(1)
            target_sq = inner.mean().clamp(min=0)
            dtype = self.gram().dtype
            self._mean = MeanGradient(inner.to(dtype), target_sq.to(dtype), self.gram().new_zeros(0, 0), None)
        return self._mean

    def matching_residual(self, selection: Selection) -> Tensor:
        """Return () ``||M - sum_j w_j g_j|| / ||M||``, from the Gram matrix."""
        gram = self.gram().double()
        return residual_of_gram(selection, gram, gram.mean(1), gram.mean())

    @property
    def complete(self) -> bool:
        """Whether the Gram matrix is known. The factors are then no longer needed."""
        return self._gram is not None

    def release(self) -> None:
        """Keep the Gram matrix and free the factors that it was computed from."""
        self.__dict__.pop("residual", None)
        self.__dict__.pop("features", None)
        self._residual = self._features = self.gram()[:, :0]


def _positions_last(x: Tensor, image: bool) -> Tensor:
    """Return (n, T, c) for a (n, c, *space) image, a (n, T, c) sequence or a (n, c) vector."""
    if x.dim() < 2:
        return x.reshape(len(x), 1, -1)
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x.flatten(2).transpose(1, 2) if image else x.flatten(1, -2)


def _real(delta: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return real factors (n, 2T, 2C), (n, 2T, d + 1) of delta (x) [conj(features), 1] for complex factors.

    ``delta`` is (n, T, C) and ``features`` (n, T, d). Torch's gradient of W in W a is delta conj(a)'. Its real and
    imaginary parts, side by side, are the sum over two positions: [Re delta, Im delta] (x) Re a and [Im delta, -Re
    delta] (x) Im a.
    """
    one, zero = (fill(len(features), features.shape[1], 1) for fill in (delta.real.new_ones, delta.real.new_zeros))
    turned = torch.cat([delta.imag, -delta.real], -1)
    real, imaginary = torch.cat([features.real, one], -1), torch.cat([features.imag, zero], -1)
    return torch.cat([torch.cat([delta.real, delta.imag], -1), turned], 1), torch.cat([real, imaginary], 1)


def proxies_at_cut(
    delta: Tensor,  # (n, ...) finite, floating or complex
    features: Tensor,  # (n, ...) of the same number of samples
    kind: Proxy,
    greatest: Tensor,  # () of delta's entries, in magnitude
) -> FlatProxies | HeadProxies:
    """Return the per-sample gradients at a cut, in at least float32.

    They are scaled to a greatest entry of 1, which changes no choice because rules are scale-free. With one position
    per sample, (n, C) and (n, d), the mean gradient's products come from the smaller of two: the Gram matrix, or the
    mean gradient itself, which takes 2 n C d more multiplications. Complex gradients are compared as vectors of their
    real and imaginary parts; under ``"flat"`` delta and the features are converted one by one.
    """
    wide = real_dtype(delta.dtype)
    turns = delta.is_complex() or features.is_complex()
    dtype = wide.to_complex() if turns else wide
    features = features.to(dtype)
    delta = delta.to(dtype) / greatest.to(wide).clamp(min=torch.finfo(wide).tiny)
    if kind == "flat":
        flat = [x.flatten(1) for x in (delta, features)]
        return FlatProxies(*(torch.view_as_real(x).flatten(1) if turns else x for x in flat))
    tokens = _positions_last(delta, delta.dim() >= 4)
    inputs = _positions_last(features, features.dim() >= 4)
    if kind == "pooled" or tokens.shape[1] != inputs.shape[1]:
        tokens, inputs = tokens.sum(1, keepdim=True), inputs.mean(1, keepdim=True)
    if turns:
        tokens, inputs = _real(tokens, inputs)
        return HeadProxies(lambda: tokens, lambda: inputs, positions=tokens.shape[1], bias=False)
    n, positions, width = tokens.shape
    if positions == 1 and n * n < 2 * width * inputs.shape[2]:
        return FlatProxies(tokens[:, 0], inputs[:, 0])
    return HeadProxies(lambda: tokens, lambda: inputs, positions=positions)


def statistics_at_cut(proxies: FlatProxies | HeadProxies, loss: Tensor | None, gram: bool) -> BatchStatistics:
    """Return the (n,) norms of the gradients at the cut as statistics, with the losses if they are given.

    With ``gram`` the rule reads the Gram matrix anyway, and its diagonal gives the squared norms.
    """
    exact: Tensor | None = None  # (n,) squared norms, if they are known or are no product of two norms
    if gram:
        exact = proxies.gram().diagonal()
    elif isinstance(proxies, HeadProxies) and proxies.positions > 1:
        exact = sequence_norm_sq(proxies.token_residual, proxies.token_features, bias=proxies.bias)
    if exact is None:
        delta_sq, activation_sq = proxies.residual.square().sum(1), proxies.features.square().sum(1) + 1
    else:
        delta_sq, activation_sq = exact, torch.ones_like(exact)
    unknown = BatchStatistics.unscored(torch.ones_like(delta_sq, dtype=torch.bool))
    known = unknown.loss.to(delta_sq.dtype) if loss is None else loss.detach().to(delta_sq.dtype)
    return unknown._replace(
        loss=known, lse=unknown.lse.to(delta_sq.dtype), residual_sq=delta_sq, feature_sq=activation_sq
    )
