"""``head_gradient="full"``: the head's exact full-batch gradient, delivered inside the autograd graph.

The head's own forward treats its parameters as constants. An identity on its output has them as inputs instead and
returns upstream * M for them in the backward, where upstream is the gradient of the step's scalar loss. So everything
that listens to the graph sees one gradient per parameter, in its place: GradScaler's scale, accumulation, and
DistributedDataParallel's reducer, which also finds the parameters reachable from the output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.hooks import watched
from selbp.common.proxies import HeadProxies
from selbp.types import MeanGradient


@dataclass
class _Delivery:
    """What travels from the scoring forward and the loss to the head's backward."""

    mean: MeanGradient | None = None
    upstream: Tensor | None = None


class _Loss(torch.autograd.Function):
    """The identity on the scalar loss; its backward runs first and keeps the upstream gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, delivery: _Delivery) -> Tensor:
        ctx.delivery = delivery
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.delivery.upstream = grads[0]
        return grads[0], None


class _Head(torch.autograd.Function):
    """The identity on the head's output that answers for the head's parameters."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, weight: Tensor, bias: Tensor | None, delivery: _Delivery) -> Tensor:
        ctx.delivery, ctx.dtypes = delivery, (weight.dtype, None if bias is None else bias.dtype)
        ctx.shape = weight.shape  # (C, d), or that of a 1x1 convolution
        return output.detach()  # the same memory, and no view: a model may edit its logits in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        upstream, mean = ctx.delivery.upstream, ctx.delivery.mean
        bias = None if mean.head_bias is None else (upstream * mean.head_bias).to(ctx.dtypes[1])
        return grads[0], (upstream * mean.head_weight).to(ctx.dtypes[0]).view(ctx.shape), bias, None


def mean_of(proxies: HeadProxies, factor: Tensor | None) -> MeanGradient:
    """The head's mean gradient; with a sampler's ``factor`` (n,), that of the gradients times it."""
    if factor is None:
        return proxies.mean_gradient()
    residual, features = proxies.token_residual, proxies.token_features
    scaled = residual * factor.to(residual)[:, None, None]
    return HeadProxies(lambda: scaled, lambda: features, positions=proxies.positions, bias=proxies.bias).mean_gradient()


class FullHeadGradient:
    """Replaces the gradient of ``head`` in the forward that trains."""

    def __init__(self, head: nn.Module) -> None:
        self._head, self._delivery, self._answers = head, _Delivery(), False

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Forwards of the head inside get their parameters' gradient from :meth:`deliver`."""
        weight, bias, delivery = self._head.weight, self._head.bias, self._delivery
        parameters = [p for p in (weight, bias) if p is not None and p.requires_grad]

        def freeze(module: nn.Module, args: Any) -> None:
            for parameter in parameters:
                parameter.requires_grad_(False)

        def answer(args: Any, kwargs: Any, output: Tensor) -> Tensor:
            thaw()
            self._answers = True
            result: Tensor = _Head.apply(output, weight, bias, delivery)
            return result

        def thaw() -> None:
            for parameter in parameters:
                parameter.requires_grad_(True)

        handle = self._head.register_forward_pre_hook(freeze)
        try:
            with watched(self._head, answer):
                yield
        finally:
            thaw()
            handle.remove()

    def deliver(self, loss: Tensor, mean: MeanGradient) -> Tensor:
        """``loss``, whose backward gives the head's parameters ``mean`` times the gradient it is called with.

        Raises RuntimeError where no forward has run the head: its gradient would be that of the chosen rows.
        """
        if not self._answers:
            raise RuntimeError(
                'head_gradient="full": the forward did not reach the head. Under torch.compile, call '
                "torch.compiler.reset() after building the step"
            )
        self._delivery.mean = mean
        result: Tensor = _Loss.apply(loss, self._delivery)
        return result
