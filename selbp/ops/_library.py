"""How an operator becomes ``torch.ops.selbp.<name>``: one place for schema, fake, backends and the autograd rule.

``Library.define/impl`` costs 5 us a call where ``custom_op`` costs 7 and ``register_autograd`` 16. For an operator that
is not differentiable autograd falls through to implementations that run below autograd, so that its outputs never
require grad and the torch calls inside record nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("selbp", "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
) -> Callable[..., Any]:
    """Register the non-differentiable operator ``schema`` and return its overload, ready to call."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, _below_autograd(cpu), "CPU")
    library.impl(name, _below_autograd(cuda), "CUDA")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"selbp::{name}", fake, lib=library)
    overload: Callable[..., Any] = getattr(torch.ops.selbp, name).default
    return overload


def _below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implementation)
    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*args)

    return call


def define_differentiable(
    schema: str,
    *,
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register the operator ``schema`` with the backward formula ``backward`` and return its overload."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, cpu, "CPU")
    library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"selbp::{name}", fake, lib=library)
    torch.library.register_autograd(f"selbp::{name}", backward, setup_context=setup_context, lib=library)
    overload: Callable[..., Any] = getattr(torch.ops.selbp, name).default
    return overload
