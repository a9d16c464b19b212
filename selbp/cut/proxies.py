"""What a selector sees at a cut: each sample's gradient there, and the activation beside it.

The layer below the cut has the gradient g_i = sum_t delta_it (x) a_it, with delta the gradient at the cut and a the
layer's input, over the positions t of a sample (steps, pixels). Where a is not handed in, the activation at the cut
stands for it. Three views of it, from cheap to exact:

* ``"pooled"``: (sum_t delta_it) (x) [mean_t a_it, 1], one position per sample;
* ``"flat"``: all positions and channels as one vector, K = (delta delta') * (a a' + 1);
* ``"positions"``: the sum over positions exactly, at a cost that grows with their number.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from selbp.common.proxies import HeadProxies, sequence_norm_sq
from selbp.selectors import GradientProxies
from selbp.types import BatchStatistics, MeanGradient, Selection, real_dtype

Proxy = Literal["pooled", "flat", "positions"]


class FlatProxies(GradientProxies):
    """One position per sample, and a mean gradient too large to form: its products come from the Gram matrix."""

    def mean_gradient(self) -> MeanGradient:
        """Inner products and norm of the mean; in place of the mean itself a tensor without elements."""
        if self._mean is None:
            inner = self.gram().double().mean(1)
            target_sq = inner.mean().clamp(min=0)
            dtype = self.gram().dtype
            self._mean = MeanGradient(inner.to(dtype), target_sq.to(dtype), self.gram().new_zeros(0, 0), None)
        return self._mean

    def matching_residual(self, selection: Selection) -> Tensor:
        """() ``||M - sum_j w_j g_j|| / ||M||``, from the Gram matrix."""
        w, rows, gram = selection.weights.double(), selection.indices, self.gram().double()
        target_sq = gram.mean()
        error = target_sq - 2 * w @ gram.mean(1)[rows] + w @ gram[rows][:, rows] @ w
        return (error.clamp(min=0) / target_sq).sqrt()

    @property
    def complete(self) -> bool:
        """Whether the Gram matrix is known: then the factors are no longer needed."""
        return self._gram is not None

    def release(self) -> None:
        """Keep the Gram matrix and let go of what it was made from."""
        self.__dict__.pop("residual", None)
        self.__dict__.pop("features", None)
        self._residual = self._features = self.gram()[:, :0]


def _positions_last(x: Tensor, image: bool) -> Tensor:
    """(n, T, c) of a (n, c, *space) image, a (n, T, c) sequence or a (n, c) vector."""
    if x.dim() < 2:
        return x.reshape(len(x), 1, -1)
    if x.dim() == 2:
        return x.unsqueeze(1)
    return x.flatten(2).transpose(1, 2) if image else x.flatten(1, -2)


def _real(delta: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Real factors (n, 2T, 2C), (n, 2T, d + 1) of delta (x) [conj(features), 1], of complex (n, T, C) and (n, T, d).

    Torch's gradient of W in W a is delta conj(a)'. Its real and imaginary parts, side by side, are the sum over two
    positions: [Re delta, Im delta] (x) Re a and [Im delta, -Re delta] (x) Im a.
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
    """The per-sample gradients at a cut, in at least float32, scaled to a greatest entry of 1: rules are scale-free.

    With one position per sample, (n, C) and (n, d), the mean gradient's products are taken from whichever is smaller:
    the Gram matrix or, at 2 n C d multiplications beside it, the mean gradient itself. Complex gradients compare as
    vectors of their real and imaginary parts; under ``"flat"`` delta and the features do so each by itself.
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
    """(n,) norms of the gradients at the cut, in a selector's terms; the loss where there is one.

    ``gram``: the rule reads the Gram matrix anyway, whose diagonal holds the squared norms.
    """
    exact: Tensor | None = None  # where the norm is not a product of two, or known
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
