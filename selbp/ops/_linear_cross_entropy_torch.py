"""``linear_cross_entropy`` and its gradients in torch's own operators, which have derivatives of every order.

Forward mode and derivatives of the gradients come from here; they are rare, and store the logits. A row without a
gradient (not valid, or not among ``rows``) is a constant, and what is in it is replaced before it meets the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype
from selbp.ops._linear_cross_entropy_cuda import Gradients, Head, Needs, Scored
from selbp.ops._loss_options import LossOptions

Outputs = tuple[Tensor, ...]


def outputs(
    plain: Outputs, head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool
) -> Outputs:
    """The operator's outputs ``plain`` with a loss that is differentiable in both modes."""
    live = _live(plain[5], rows)
    _, z, t = _terms(live, head, target, options)
    log_p = torch.log_softmax(reference.soft_cap(z, options.softcap), 1)
    loss = -(t * torch.where(t == 0, 0.0, log_p)).sum(1)
    return torch.where(live, loss, plain[0]), *plain[1:]


def gradients(
    grad: Tensor, head: Head, scored: Scored, rows: Tensor | None, options: LossOptions, needs: Needs
) -> Gradients:
    """The gradients of features, weight and bias, of no elements where they are not needed."""
    features, weight, bias = head
    softcap = options.softcap
    live = _live(scored.valid, rows)
    h, z, t = _terms(live, head, scored.target, options)
    capped = reference.soft_cap(z, softcap)
    r = t.sum(1, keepdim=True) * torch.softmax(capped, 1) - t
    if softcap:
        r = r * (1.0 - (capped / softcap).square())
    r = torch.where(live[:, None], r, 0.0) * torch.where(live, grad.to(r.dtype), 0.0)[:, None]
    d_features, d_weight, d_bias = features.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if needs.features:
        d_features = (r @ weight.to(r.dtype)).to(features.dtype)
    if needs.weight:
        d_weight = (r.t() @ h.to(r.dtype)).to(weight.dtype)
    if needs.bias and bias is not None:
        d_bias = r.sum(0).to(bias.dtype)
    return d_features, d_weight, d_bias


def _live(valid: Tensor, rows: Tensor | None) -> Tensor:
    """(n,) bool: the rows that have a gradient."""
    return valid if rows is None else valid & torch.zeros_like(valid).index_fill(0, rows, True)


def _terms(live: Tensor, head: Head, target: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Features h, logits z before the cap and soft target t; those of rows that are not ``live`` mean nothing."""
    features, weight, bias = head
    dtype = accumulate_dtype(features.dtype)
    h = torch.where(live[:, None], features, 0.0)
    z = torch.nn.functional.linear(h, weight, bias).to(dtype)
    y = torch.where(live, target, 0)
    t = reference.soft_target(y, weight.shape[0], options.class_weight, options.label_smoothing, dtype)
    return h, z, t
