"""``linear_cross_entropy`` and its gradients in torch's own operators, which have derivatives of every order.

Forward mode and derivatives of the gradients come from here; they are rare, and store the logits. A row without a
gradient (not valid, or not among ``rows``) is a constant, and what is in it is replaced before it meets the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype

Outputs = tuple[Tensor, ...]


def outputs(
    plain: Outputs, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, rows: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> Outputs:  # fmt: skip
    """The operator's outputs ``plain`` with a loss that is differentiable in both modes."""
    live = _live(plain[5], rows)
    _, z, t = _terms(live, features, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap)
    log_p = torch.log_softmax(reference.soft_cap(z, softcap), 1)
    loss = -(t * torch.where(t == 0, 0.0, log_p)).sum(1)
    return torch.where(live, loss, plain[0]), *plain[1:]


def gradients(
    grad: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lse: Tensor, others: Tensor,
    valid: Tensor, class_weight: Tensor | None, rows: Tensor | None, ignore_index: int, label_smoothing: float,
    softcap: float, need_features: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of features, weight and bias, of no elements where they are not needed."""
    live = _live(valid, rows)
    h, z, t = _terms(live, features, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap)
    capped = reference.soft_cap(z, softcap)
    r = t.sum(1, keepdim=True) * torch.softmax(capped, 1) - t
    if softcap:
        r = r * (1.0 - (capped / softcap).square())
    r = torch.where(live[:, None], r, 0.0) * torch.where(live, grad.to(r.dtype), 0.0)[:, None]
    d_features, d_weight, d_bias = features.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_features:
        d_features = (r @ weight.to(r.dtype)).to(features.dtype)
    if need_weight:
        d_weight = (r.t() @ h.to(r.dtype)).to(weight.dtype)
    if need_bias and bias is not None:
        d_bias = r.sum(0).to(bias.dtype)
    return d_features, d_weight, d_bias


def _live(valid: Tensor, rows: Tensor | None) -> Tensor:
    """(n,) bool: the rows that have a gradient."""
    return valid if rows is None else valid & torch.zeros_like(valid).index_fill(0, rows, True)


def _terms(
    live: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Features h, logits z before the cap and soft target t; those of rows that are not ``live`` mean nothing."""
    dtype = accumulate_dtype(features.dtype)
    h = torch.where(live[:, None], features, 0.0)
    z = torch.nn.functional.linear(h, weight, bias).to(dtype)
    y = torch.where(live, target, 0)
    return h, z, reference.soft_target(y, weight.shape[0], class_weight, label_smoothing, dtype)
