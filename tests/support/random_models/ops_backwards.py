"""Steps with backwards of one's own: functions whose backward does with a gradient whatever people do, and hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from support.random_models.backwards import BACKWARDS
from support.random_models.context import Context, step


class Own(torch.autograd.Function):
    """The sine, with a backward that is written in the way ``how`` says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = how
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return BACKWARDS[ctx.how](g, x), None


@step("any", mixes=True, weight=12)
def own_function(c: Context, x: Tensor) -> Tensor:
    how = c.pick("backward", BACKWARDS)
    c.store.single |= how == "single"
    return Own.apply(x, how)


class Pair(torch.autograd.Function):
    """Two inputs, two outputs, one of which may go unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor) -> Any:
        ctx.save_for_backward(x, p)
        ctx.set_materialize_grads(False)
        return x * p, x + p

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> Any:
        x, p = ctx.saved_tensors
        gx, gp = 0.0, 0.0
        if g is not None:
            gx, gp = gx + g * p, gp + (g * x).sum_to_size(p.shape)
        if h is not None:
            gx, gp = gx + h, gp + h.sum_to_size(p.shape)
        return (gx, gp) if g is not None or h is not None else (None, None)


@step("any")
def own_pair(c: Context, x: Tensor) -> Tensor:
    first, second = Pair.apply(x, c.param(*[1] * (x.dim() - 1), x.shape[-1]))
    return {"first": first, "second": second, "both": first * second}[c.pick("use", ["first", "second", "both"])]


HOOKS: dict[str, Any] = {
    "scale": lambda g: g * 0.5,
    "negate": lambda g: -g,
    "clamp": lambda g: g.clamp(-0.05, 0.05),
    "square": lambda g: g * g,
    "deepcopy": lambda g: copy.deepcopy(g) * 2,
    "add": lambda g: g + 0.1,
    "none": lambda g: None,
    "clone_write": lambda g: _clone_write(g),
    "norm": lambda g: g * (1 / (1 + g.norm())),
    "center": lambda g: g - g.mean(0),
    "abs": lambda g: g.abs(),
    "nan_to_num": lambda g: torch.nan_to_num(g),
    "finite": lambda g: g if bool(g.isfinite().all()) else g * 0,
    "mask_first": lambda g: g * (torch.arange(len(g)).view(-1, *[1] * (g.dim() - 1)) > 0),
    "single": lambda g: g.float().double(),
    "relu": lambda g: torch.relu(g),
    "sum_all": lambda g: g + g.sum(),
    "max_scale": lambda g: g / (g.abs().max() + 1),
}


def _clone_write(g: Tensor) -> Tensor:
    out = g.clone()
    out[:, :1].mul_(3)
    out[..., 0].fill_(0.1)
    return out


def _pick(c: Context) -> Any:
    how = c.pick("hook", HOOKS)
    c.store.single |= how == "single"
    return lambda gradient: None if gradient is None else HOOKS[how](gradient)


@step("any", mixes=True, weight=8)
def hook(c: Context, x: Tensor) -> Tensor:
    if x.requires_grad:
        x = x * 1
        x.register_hook(_pick(c))
    return x


@step("any", mixes=True)
def hook_two(c: Context, x: Tensor) -> Tensor:
    """A tensor with two hooks that is read twice."""
    if x.requires_grad:
        x = x * 1
        for _ in range(2):
            x.register_hook(_pick(c))
    return x * x.sin()


@step("any")
def spy(c: Context, x: Tensor) -> Tensor:
    """A hook that only looks: what it sees is compared too."""
    seen = c.seen.setdefault(c.key, [])
    if x.requires_grad:
        x = x * 1
        x.register_hook(lambda gradient: seen.append(torch.zeros(()) if gradient is None else gradient + 0))
    return x


@step("any")
def retained(c: Context, x: Tensor) -> Tensor:
    """A hidden tensor whose gradient is kept, and compared."""
    if x.requires_grad:
        x = x * 1
        x.retain_grad()
        c.retained[c.key] = x
    return x


@step("any", mixes=True)
def module_hook(c: Context, x: Tensor) -> Tensor:
    layer = c.module(lambda: nn.Linear(x.shape[-1], 4))
    change = c.pick("hook", ["scale", "clamp", "square", "none", "deepcopy"])

    def back(module: nn.Module, given: Any, received: Any) -> Any:
        out = None if given[0] is None else HOOKS[change](given[0])
        return None if out is None else (out,)

    handle = layer.register_full_backward_hook(back)
    out = layer(x)
    handle.remove()
    return out
