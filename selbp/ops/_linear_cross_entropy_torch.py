"""``linear_cross_entropy`` and its gradients in torch's own operators, which have derivatives of every order.

Forward mode and derivatives of the gradients come from here; they are rare, and store the logits. A row without a
gradient (not valid, or not among ``rows``) is a constant, and what is in it is replaced before it meets the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import accumulate_dtype
from selbp.ops._linear_cross_entropy_cuda import Gradients, Head, Needs, Scored
from selbp.ops._loss_options import LossOptions

Outputs = tuple[Tensor, ...]


def outputs(
    plain: Outputs, head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool, skip_mass: float
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


def pack_backward(*flat: Any) -> tuple[Any, ...]:
    """The gradients' arguments, in the order of the schema, as :func:`gradients` takes them."""
    grad, features, weight, bias, target, lse, p_rest, valid, logits, left_out, class_weight, rows, *options = flat
    *options, need_features, need_weight, need_bias = options
    head, scored = Head(features, weight, bias), Scored(target, lse, p_rest, valid, logits, left_out)
    return grad, head, scored, rows, LossOptions(class_weight, *options), Needs(need_features, need_weight, need_bias)


def setup_second(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
    """Keep what the derivatives of the gradients need."""
    needs = inputs[-3:]
    ctx.mark_non_differentiable(*(gradient for gradient, needed in zip(output, needs, strict=True) if not needed))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:12])
    ctx.options = inputs[12:]


def backward_second(ctx: Any, needed: Sequence[bool], *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """The derivatives of the gradients, of the same formula in torch's operators.

    By torch.func.vjp, which nests: the incoming gradient may itself depend on the weight, and vmap may be at work.
    """
    inputs, places = list(ctx.saved_tensors), [i for i, need in enumerate(needed) if need]
    given = [i for i, u in enumerate(upstream) if u is not None]

    def chosen(*wanted: Tensor) -> tuple[Tensor, ...]:
        for i, x in zip(places, wanted, strict=True):
            inputs[i] = x
        first = gradients(*pack_backward(*inputs, *ctx.options))
        return tuple(first[i] for i in given)

    found: list[Tensor | None] = [None] * len(needed)
    if given:
        with torch._C._DisableAutocast():
            pull: Any = torch.func.vjp(chosen, *(inputs[i] for i in places))[1]
            pulled = pull(tuple(u for u in upstream if u is not None))
        for i, gradient in zip(places, pulled, strict=True):
            found[i] = gradient
    return tuple(found)
