"""How an operator becomes ``torch.ops.selbp.<name>``: one place for schema, checks, fake, backends and autograd.

``Library.define/impl`` costs 5 us a call where ``custom_op`` costs 7 and ``register_autograd`` 16. Whoever calls the
operator, by the function in ``selbp.ops`` or by its name, runs the same checks: they stand in front of every backend
and of the fake. For an operator that is not differentiable autograd falls through to implementations that run below
autograd, so that its outputs never require grad and the torch calls inside record nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as are_transforms_active
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

library = torch.library.Library("selbp", "DEF")

# autograd.Function would hand itself to torch.func's transforms, which the dispatcher has dealt with by the time an
# operator's Autograd kernel runs. What torch.func itself uses there has been called this since torch 2.0.
_Function: Any = torch.autograd.function._SingleLevelFunction
_NOTHING = contextlib.nullcontext()
_LAYOUTS = (
    "SparseCPU",
    "SparseCUDA",
    "SparseCsrCPU",
    "SparseCsrCUDA",
    "NestedTensorCPU",
    "NestedTensorCUDA",
    "MkldnnCPU",
    "QuantizedCPU",
    "QuantizedCUDA",
)


def _any_wants_gradient(*args: Any) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in args)


_any_requires_grad: Callable[..., bool] = getattr(torch._C, "_any_requires_grad", _any_wants_gradient)  # not in 2.6


def _unchanged(*args: Any) -> tuple[Any, ...]:
    return args


def define(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    pack: Callable[..., tuple[Any, ...]] | None = None,
    autocast: Callable[..., tuple[Any, ...]] = _unchanged,
) -> Callable[..., Any]:
    """Register the non-differentiable operator ``schema`` and return its overload, ready to call.

    ``check`` takes the operator's arguments and raises where they do not fit. ``pack`` turns the schema's flat
    arguments into those of ``check``, ``fake``, ``cpu`` and ``cuda``; None where they are the same. ``autocast`` takes
    the flat arguments and returns them as an enabled autocast hands them over; inside the operator autocast is off.
    """
    overload = _register(schema, check, fake, cpu, cuda, pack, autocast)
    library.impl(schema.split("(")[0], torch.library.fallthrough_kernel, "Autograd")
    return overload


def define_differentiable(
    schema: str,
    *,
    check: Callable[..., None],
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    composed: Callable[..., Any],
    pack: Callable[..., tuple[Any, ...]] | None = None,
    autocast: Callable[..., tuple[Any, ...]] = _unchanged,
) -> Callable[..., Any]:
    """Register the operator ``schema`` with the backward formula ``backward`` and return its overload.

    ``backward`` is handed the context, which inputs need a gradient, and the outputs' gradients.
    ``composed`` is handed the operator's outputs and its packed arguments, and returns the outputs made of torch's own
    differentiable operators: forward mode takes its tangents from it.
    """
    name = schema.split("(")[0]
    overload: Any = _register(schema, check, fake, cpu, cuda, pack, autocast)

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        if are_transforms_active():  # the next level of torch.func differentiates too, in either mode
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def forward(ctx: Any, keyset: Any, *args: Any) -> Any:
        outputs = below(keyset, args)
        setup_context(ctx, args, outputs)
        return outputs

    def backward_formula(ctx: Any, *grads: Any) -> Any:
        return None, *backward(ctx, ctx.needs_input_grad[1:], *grads)

    function: Any = type(
        name, (_Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward_formula)}
    )

    def differentiable(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(x) for x in args):
            with torch.no_grad():
                outputs = below(keyset, args)
            return composed(outputs, *(args if pack is None else pack(*args)))
        if torch.is_grad_enabled() and _any_requires_grad(*args):
            with enable_single_level_autograd_function() if are_transforms_active() else _NOTHING:
                return function.apply(keyset, *args)
        return below(keyset, args)

    library.impl(name, differentiable, "Autograd", with_keyset=True)
    return overload


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _register(
    schema: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    pack: Callable[..., tuple[Any, ...]] | None,
    autocast: Callable[..., tuple[Any, ...]],
) -> Callable[..., Any]:
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload: Any = getattr(torch.ops.selbp, name).default

    def backend(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if pack is not None:
                args = pack(*args)
            check(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return implementation(*args)

        return call

    def checked_fake(*args: Any) -> Any:
        if pack is not None:
            args = pack(*args)
        check(*args)
        return fake(*args)

    def below_autocast(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return overload(*autocast(*args))

    def refuse(*args: Any) -> NoReturn:
        for argument, value in zip(overload._schema.arguments, args, strict=True):
            if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested or value.is_quantized):
                kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
                kind = "quantized" if value.is_quantized else kind
                raise TypeError(f"{argument.name} must be a dense tensor, got a {kind} one")
        raise TypeError(f"{name} takes dense tensors only")

    library.impl(name, backend(cpu), "CPU")
    library.impl(name, backend(cuda), "CUDA")
    for key in ("AutocastCPU", "AutocastCUDA"):
        library.impl(name, below_autocast, key)
    for key in _LAYOUTS:
        library.impl(name, refuse, key)
    torch.library.register_fake(f"selbp::{name}", checked_fake, lib=library)
    return overload
