"""Steps with backwards of one's own: functions whose backward does with a gradient whatever people do, and hooks."""

from __future__ import annotations

import copy
from typing import Any

import torch
from model_context import Context, step
from torch import Tensor, nn


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


def _by_loop(g: Tensor, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i] = g[i] * x[i].cos()
    return out


def _through_data(g: Tensor, x: Tensor) -> Tensor:
    out = g.clone()
    out.data.mul_(x.cos())
    return out


def _items(g: Tensor, x: Tensor) -> Tensor:
    return torch.tensor(g.tolist(), dtype=x.dtype).view(x.shape) * x.cos()


BACKWARDS: dict[str, Any] = {
    "plain": lambda g, x: g * x.cos(),
    "square": lambda g, x: g * g * x.cos(),
    "power": lambda g, x: g**3,
    "pow_call": lambda g, x: torch.pow(g, 2) * x,
    "abs": lambda g, x: g.abs() * x,
    "sqrt_abs": lambda g, x: (g.abs() + 1).sqrt() * x,
    "clone_mul": lambda g, x: g.clone().mul_(x.cos()),
    "clone_add": lambda g, x: g.clone().add_(0.1).mul_(x),
    "index": lambda g, x: torch.cat([g[:1] * 2, g[1:]]) * x.cos(),
    "index_list": lambda g, x: g[list(range(len(g)))[::-1]] * x.cos(),
    "mask": lambda g, x: g * (x > 0) + 0.1 * g * (g > 0),
    "boolean": lambda g, x: torch.zeros_like(x).masked_scatter_(x > 0, g[x > 0]),
    "numpy": lambda g, x: torch.from_numpy(g.numpy().copy()) * x.cos(),
    "detach_numpy": lambda g, x: torch.as_tensor(g.detach().cpu().numpy() * 2) * x.cos(),
    "loop": _by_loop,
    "data": _through_data,
    "items": _items,
    "norm": lambda g, x: g * (1 + g.norm()) * x,
    "mean": lambda g, x: g - g.mean(),
    "max": lambda g, x: g * (g.max() + 1).item(),
    "sum_float": lambda g, x: g * float(g.sum()),
    "clamp": lambda g, x: g.clamp(-0.1, 0.1) * x,
    "cumsum": lambda g, x: g.cumsum(0) * x,
    "sort": lambda g, x: g.flatten(1).sort(0)[0].view_as(x) if g.dim() > 1 else g,
    "where_self": lambda g, x: torch.where(g > 0, g, 0.5 * g),
    "where_const": lambda g, x: torch.where(x > 0, g, torch.full_like(g, 0.1)),
    "ones": lambda g, x: torch.ones_like(g) * x + g,
    "empty": lambda g, x: torch.empty_like(g).copy_(g) * x,
    "new_tensor": lambda g, x: g.new_tensor([2.0]) * g,
    "new_zeros": lambda g, x: g.new_zeros(g.shape) + g * x,
    "none": lambda g, x: None,
    "contiguous": lambda g, x: g.contiguous().view(-1).view(x.shape) * x.cos(),
    "transposed": lambda g, x: g.transpose(0, -1).contiguous().transpose(0, -1) * x,
    "outer": lambda g, x: torch.einsum("a...,a...->a...", g, x),
    "rank": lambda g, x: (g.flatten(1) @ g.flatten(1).t() @ x.flatten(1)).view_as(x),
    "product_of_gradients": lambda g, x: g * g.flip(0),
    "divide": lambda g, x: g / (1 + g.abs()) * x,
    "exp": lambda g, x: (g * 0.1).exp() * x,
    "std": lambda g, x: g / (g.std(correction=0) + 1),
    "deepcopy": lambda g, x: copy.deepcopy(g) * x,
    "single": lambda g, x: g.to(torch.float32).to(g.dtype) * x,
    "detach": lambda g, x: g.detach() * x.cos(),
    "equal": lambda g, x: g * (2.0 if torch.equal(g, g.clone()) else 1.0),
    "allclose": lambda g, x: g * (2.0 if torch.allclose(g, torch.zeros_like(x)) else 1.0),
    "in_place": lambda g, x: g.clone().div_(2).neg_().mul_(x).add_(g).sub_(g * 0.5).mul_(0.7),
    "in_place_mask": lambda g, x: g.clone().masked_fill_(x > 0, 0.0).div_(x.square() + 1),
    "split": lambda g, x: torch.cat([part * i for i, part in enumerate(g.split(1, -1), 1)], -1) - g * x,
    "split_sizes": lambda g, x: torch.cat(g.split_with_sizes([1, g.shape[-1] - 1], -1)[::-1], -1),
    "unbind_last": lambda g, x: torch.stack([part * x[..., 0] for part in g.unbind(-1)], -1),
    "squeezed": lambda g, x: g[:, None].squeeze(1).unsqueeze(-1).squeeze().view(x.shape) * x,
    "sgn": lambda g, x: g.sgn() * g * x,
    "mean_last": lambda g, x: g - g.mean(-1, keepdim=True) + g.mean() * x,
    "addcmul": lambda g, x: torch.addcmul(g, g, x, value=0.5),
    "dot": lambda g, x: torch.dot(g.reshape(-1), x.reshape(-1)) * x,
    "zeros_like": lambda g, x: torch.zeros_like(g).add_(g).mul_(x),
    "new": lambda g, x: g.new_ones(g.shape) * x + g.new_full((1,), 0.5) + g.new_empty(()).fill_(0.1),
    "max_dim": lambda g, x: g.max(-1, keepdim=True)[0] * x,
    "topk": lambda g, x: g.topk(1, -1)[0] * x,
    "chunk": lambda g, x: torch.cat(g.chunk(2, 0)[::-1], 0)[: len(x)] * x,
    "flatten_norm": lambda g, x: g / (g.flatten(1).norm(dim=1).view(-1, *[1] * (g.dim() - 1)) + 1),
    "matmul_weight": lambda g, x: g @ x.flatten(1)[:1, :1].expand(g.shape[-1], g.shape[-1]),
    "view_write": lambda g, x: _view_write(g, x),
    "out": lambda g, x: torch.mul(g, x, out=torch.empty_like(x)),
    "reversed_minus": lambda g, x: 1 - g,
    "less": lambda g, x: (g < 0.05).to(x.dtype),
    "shape_walk": lambda g, x: torch.stack(list(g.unbind(0))) * x,
    "iterate": lambda g, x: torch.stack(list(g)) * x,
    "bitwise": lambda g, x: g.masked_fill((g > 0.01) & (x > 0), 0.1),
    "addmm": lambda g, x: torch.addmm(x.flatten(1), g.flatten(1) @ g.flatten(1).t(), x.flatten(1)).view_as(x),
}


def _view_write(g: Tensor, x: Tensor) -> Tensor:
    out = g.clone()
    out[..., 0] = x[..., 0]
    out.flatten()[1:2] = 0.5
    return out


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
    return HOOKS[how]


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
        x.register_hook(lambda gradient: seen.append(gradient + 0))
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
