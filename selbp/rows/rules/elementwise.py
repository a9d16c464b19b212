"""Rules of pointwise operators: the chosen rows of the other operands are taken.

Where the gradient's row is zero, the result's row must be zero. This holds for sums of gradients, products with a dense
tensor, and the pointwise ``*_backward`` kernels, which are linear in their first argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.layout import Layout
from selbp.rows.registry import RULES, NoRuleError, overloads, require, rule
from selbp.rows.wrap import base_of, wrap, wrap_view, writable

aten = torch.ops.aten


def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
    """Run ``func`` on the k rows of every tensor. Tensors broadcast, so dims are counted from the end."""
    layout: Layout | None = None
    end = 0
    operands = list(args)
    for position, value in enumerate(args):
        if type(value) is RowGradient:
            data, own = value._data, value._layout
            operands[position] = data
            if layout is None:
                layout, end = own, own.dim - data.dim()
            elif own is not layout or own.dim - data.dim() != end:
                aligned = own.dim - data.dim() == end and (own.pre, own.post) == (layout.pre, layout.post)
                require(own.rows is layout.rows and aligned, "two gradients with their samples in different places")
    assert layout is not None
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and type(value) is not RowGradient:
            dim = value.dim() + end
            if dim >= 0 and (value.shape[dim] != 1 or layout.full == 1):
                operands[position] = layout.take(value, dim)
    out = func(*operands, **kwargs) if kwargs else func(*operands)
    if isinstance(out, Tensor):
        return wrap(out, layout.at(out.dim() + end))
    return tuple(wrap(item, layout.at(item.dim() + end)) for item in out)


def linear(func: Any, gradient: RowGradient, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run :func:`pointwise` in the most frequent case: one gradient, of the result's shape, and none in ``args``."""
    data, layout = gradient._data, gradient._layout
    end = layout.dim - data.dim()
    operands: list[Any] = [data]
    for value in args:
        if isinstance(value, Tensor):
            if type(value) is RowGradient:
                raise NoRuleError("not linear in a second gradient")
            dim = value.dim() + end
            if dim >= 0 and (value.shape[dim] != 1 or layout.full == 1):
                value = layout.take(value, dim)
        operands.append(value)
    return wrap(func(*operands, **kwargs), layout)


@rule(
    *("threshold_backward", "gelu_backward", "silu_backward", "sigmoid_backward", "tanh_backward", "elu_backward"),
    *("hardtanh_backward", "leaky_relu_backward", "hardswish_backward", "hardsigmoid_backward", "softplus_backward"),
    *("mish_backward", "log_sigmoid_backward", "logit_backward", "softshrink_backward", "hardshrink_backward"),
    *(
        "native_dropout_backward",
        "_masked_scale",
        "rrelu_with_noise_backward",
    ),
)
def activation(func: Any, gradient: Any, *args: Any, **kwargs: Any) -> Any:
    """Linear in the gradient, which is the first argument."""
    if type(gradient) is not RowGradient:
        raise NoRuleError("the gradient is dense, a saved tensor is not")
    return linear(func, gradient, args, kwargs)


@rule("_prelu_kernel_backward")
def leaky(func: Any, gradient: Any, saved: Any, weight: Tensor) -> Any:
    """Linear in the gradient, which is the first argument."""
    require(type(gradient) is RowGradient and type(saved) is not RowGradient, "not linear in a second gradient")
    return pointwise(func, (gradient, saved, weight))


@rule("glu_backward")
def gated(func: Any, gradient: Any, saved: Tensor, dim: int) -> Any:
    """The halves are not split along the samples."""
    require(isinstance(gradient, RowGradient) and not isinstance(saved, RowGradient), "the gradient is dense")
    require(dim % gradient.dim() != gradient._layout.dim, "split along the samples")
    return pointwise(func, (gradient, saved, dim))


def _loss_backward(reduction: int) -> Any:
    def loss_backward(func: Any, gradient: Any, output: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        require(isinstance(gradient, RowGradient), "the gradient is dense")
        require(
            not isinstance(output, RowGradient) and not isinstance(target, RowGradient),
            "not linear in the saved tensors",
        )
        require(len(args) > reduction and args[reduction] == 0, 'reduction is not "none"')
        return pointwise(func, (gradient, output, target, *args), kwargs)

    return loss_backward


rule(
    *("mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "soft_margin_loss_backward"),
    when='reduction="none".',
)(_loss_backward(0))
rule("binary_cross_entropy_backward", when='reduction="none".')(_loss_backward(1))


@rule("mul.Tensor", "mul.Scalar")
def multiply(func: Any, first: Any, second: Any) -> Any:
    """Always."""
    if type(first) is RowGradient and type(second) is Tensor and second.dim() <= first.dim():
        return linear(torch.mul, first, (second,), {})
    return pointwise(func, (first, second))


@rule("div.Tensor", "div.Scalar")
def divide(func: Any, first: Any, second: Any) -> Any:
    """The gradient is the dividend, not the divisor."""
    require(isinstance(first, RowGradient) and not isinstance(second, RowGradient), "the divisor is a gradient: 0 / 0")
    return pointwise(func, (first, second))


@rule("add.Tensor", "sub.Tensor")
def add(func: Any, first: Any, second: Any, **kwargs: Any) -> Any:
    """Both are gradients of the same selection."""
    if type(first) is type(second) and first._layout is second._layout and first._data.shape == second._data.shape:
        return wrap(func(first._data, second._data, **kwargs), first._layout)
    both = isinstance(first, RowGradient) and isinstance(second, RowGradient)
    require(both, "the other summand is not a gradient of this selection")
    return pointwise(func, (first, second), kwargs)


@rule("addcmul")
def multiply_add(func: Any, gradient: Any, first: Any, second: Any, **kwargs: Any) -> Any:
    """Summand and product are gradients of the same selection."""
    factors = isinstance(first, RowGradient) or isinstance(second, RowGradient)
    require(isinstance(gradient, RowGradient) and factors, "a summand is dense")
    return pointwise(func, (gradient, first, second), kwargs)


@rule(
    *("mul_.Tensor", "mul_.Scalar", "div_.Tensor", "div_.Scalar", "add_.Tensor", "sub_.Tensor", "neg_"),
    *("masked_fill_.Scalar", "masked_fill_.Tensor"),
)
def in_place(func: Any, gradient: Any, *args: Any, **kwargs: Any) -> Any:
    """The out-of-place form has a rule that applies, and the result keeps the gradient's shape."""
    require(isinstance(gradient, RowGradient) and writable(gradient), "written to a dense tensor, or to a copy")
    name = f"{func._overloadpacket.__name__[:-1]}.{func._overloadname}".removesuffix(".default")
    (other,) = overloads(name)
    out = RULES[other](other, gradient, *args, **kwargs)
    require(out._layout is gradient._layout and out._data.shape == gradient._data.shape, "the result has another shape")
    gradient._data.copy_(out._data)  # the views share the storage, so they see the write
    return gradient


def _is_zero(value: Any) -> bool:
    """Return whether ``value`` is known to be zero without reading a device."""
    if isinstance(value, RowGradient):
        return False
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.device.type == "cpu" and bool(value == 0)
    return bool(value == 0)


@rule("where.self")
def where(func: Any, condition: Any, first: Any, second: Any) -> Any:
    """Both branches are gradients of the same selection, or one is the scalar 0."""
    require(not isinstance(condition, RowGradient), "the condition is a gradient")
    branches = [value for value in (first, second) if not isinstance(value, RowGradient)]
    require(all(_is_zero(value) for value in branches), "a branch is neither a gradient nor 0")
    return pointwise(func, (condition, first, second))


@rule("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(func: Any, gradient: Any, mask: Any, value: Any) -> Any:
    """The value is 0."""
    require(isinstance(gradient, RowGradient) and not isinstance(mask, RowGradient), "the gradient is the mask")
    require(_is_zero(value) and mask.dim() <= gradient.dim(), "the value is not 0")
    return pointwise(aten.masked_fill.Scalar, (gradient, mask, 0))


@rule("neg", "clone", "_to_copy", "zeros_like", "_conj_physical")
def copy(func: Any, gradient: RowGradient, *args: Any, **kwargs: Any) -> Any:
    """Always."""
    return wrap(func(gradient._data, *args, **kwargs), gradient._layout)


@rule("_conj", "_neg_view")
def resolved(func: Any, gradient: RowGradient) -> Any:
    """Always. The data are resolved at once, because torch resolves no such bit below dispatch."""
    data = gradient._data
    data = data.conj_physical() if func is aten._conj.default else data.neg()
    gradient._rows.copied.add(id(base_of(gradient)))
    return wrap_view(data, gradient._layout, gradient, func, ())


@rule("abs", "sgn", "sign")
def maps_zero_to_zero(func: Any, gradient: RowGradient) -> Any:
    """Always: zero is mapped to zero."""
    return wrap(func(gradient._data), gradient._layout)
