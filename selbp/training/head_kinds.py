"""Heads beside a plain ``nn.Linear``: 1x1 convolutions, adapters, derived weights, and raw parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from selbp.common.buffers import buffers_put_back


def is_pointwise(module: nn.Module) -> bool:
    """Whether ``module`` is a convolution that is a linear layer at each position: kernel 1, no groups, no stride."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    ones = all(size == 1 for size in (*module.kernel_size, *module.stride))
    padding = module.padding if isinstance(module.padding, tuple) else ()
    return ones and module.groups == 1 and not any(padding)


def positions_last(head: nn.Module | None, x: Tensor) -> Tensor:
    """What ``head`` read or gave, with its channels in the last dim: (n, d, ...) of a convolution as (n, ..., d)."""
    return x.movedim(1, -1) if head is not None and is_pointwise(head) else x


def widths(module: nn.Module) -> tuple[int, int]:
    """Features that a linear or 1x1 convolution layer reads, and classes that it gives; its weight may be sharded."""
    if (declared := _declared_widths(module)) is not None:
        return declared
    weight: Any = module.weight
    return weight.shape[1], weight.shape[0]


def _declared_widths(module: nn.Module) -> tuple[int, int] | None:
    for reads, gives in (("in_features", "out_features"), ("in_channels", "out_channels")):
        if isinstance(found := getattr(module, reads, None), int):
            return found, int(getattr(module, gives))
    return None


def layer_of(names: dict[str, nn.Module], name: str) -> str:
    """The layer that the module ``name`` is a parametrization of, such as weight normalisation; else ``name``."""
    layer = f".{name}".partition(".parametrizations.")[0][1:]
    return layer if layer in names and is_parametrized(names[layer]) else name


def weight_shape(layer: nn.Module | None) -> tuple[int, ...] | None:
    """The shape of the layer's weight, None where it has none.

    To read a parametrized weight computes it, and spectral normalisation then goes on by a step. So the layer is asked
    for its widths (C, d); one that does not tell them keeps its buffers.
    """
    if layer is None or not is_parametrized(layer, "weight"):
        weight = getattr(layer, "weight", None)
        return tuple(weight.shape) if isinstance(weight, Tensor) else None
    if (declared := _declared_widths(layer)) is not None:
        return declared[::-1]
    with torch.no_grad(), buffers_put_back(layer):
        weight = layer.weight
        return tuple(weight.shape) if isinstance(weight, Tensor) else None


def derived_weights(layer: nn.Module) -> list[str]:
    """Which of weight and bias are no parameters of the layer: a parametrization or a hook computes them."""
    own = {*layer._parameters, *layer._buffers}
    return [
        name
        for name in ("weight", "bias")
        if is_parametrized(layer, name) or (name not in own and isinstance(getattr(layer, name, None), Tensor))
    ]


def is_adapter(module: nn.Module | None) -> bool:
    """Whether ``module`` wraps a linear layer, its ``base_layer``, and adds to the layer's output, as LoRA does."""
    base = getattr(module, "base_layer", None)
    weight = getattr(base, "weight", None)
    return isinstance(base, nn.Module) and isinstance(weight, Tensor) and weight.dim() == 2


def through_adapter(names: dict[str, nn.Module], name: str) -> str:
    """The outermost adapter that the layer ``name`` is inside: what it reads and gives is the head's; else ``name``."""
    parts = name.split(".")
    for length in range(len(parts)):
        outer = ".".join(parts[:length])
        if outer in names and is_adapter(names[outer]):
            return outer
    return name


def raw_parameter_after(names: dict[str, nn.Module], name: str) -> str | None:
    """Return the name of a bare parameter that may be the model's real head, such as ArcFace's weight; else None.

    The parameter has as many rows or columns as the linear layer ``name`` has outputs, so the layer's output may be
    multiplied with it. It belongs to the model, to a container around the layer, or to a module beside such a
    container. Parameters of torch's own modules and their subclasses are no candidates: their use is known.
    """
    around = {"", *(name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1))}
    around = {outer for outer in around if outer in names}
    outputs = widths(names[name])[1]
    for holder, module in names.items():
        near = holder in around or holder.rpartition(".")[0] in around
        if not near or _of_torch(module):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2 and outputs in parameter.shape and parameter.is_floating_point():
                return f"{holder}.{own}" if holder else own
    return None


def _of_torch(module: nn.Module) -> bool:
    heir = any(kind.__module__.startswith("torch.nn.modules") and kind is not nn.Module for kind in type(module).mro())
    return heir and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
