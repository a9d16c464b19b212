"""What backwards that people write do with a gradient ``g``, given the function's input ``x``: by name."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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
    "noise": lambda g, x: g + 0.1 * torch.randn_like(g),
    "rand": lambda g, x: g * torch.rand(g.shape, dtype=g.dtype),
    "dropout": lambda g, x: nn.functional.dropout(g, 0.5) * x,
    "bernoulli": lambda g, x: g * torch.empty_like(g).bernoulli_(0.5),
    "softmax": lambda g, x: g.softmax(-1) * x,
    "normalize": lambda g, x: nn.functional.normalize(g + 1, dim=-1),
    "assign_mask": lambda g, x: _assigned(g.clone(), x > 0, 0.3),
    "assign_column": lambda g, x: _assigned(g.clone(), (..., 0), x[..., 0]),
    "assign_row": lambda g, x: _assigned(g.clone(), 0, 0.7) * x,
    "assign_last": lambda g, x: _assigned(g.clone(), (slice(None), slice(1, None)), 0.0) * x,
    "assign_rows": lambda g, x: _assigned(g.clone(), slice(None, None, 2), 0.0) + g * x,
    "add_to_view": lambda g, x: _added(g.clone(), x),
    "transposed_write": lambda g, x: _written(g.clone(), x),
    "lerp_": lambda g, x: g.clone().lerp_(x, 0.3),
    "addcmul_": lambda g, x: g.clone().addcmul_(g, x, value=0.5).addcdiv_(g, x * x + 1),
    "index_add_": lambda g, x: torch.zeros_like(x).index_add_(0, torch.arange(len(x)).flip(0), g),
    "scatter_": lambda g, x: torch.zeros_like(x).scatter_(-1, x.argsort(-1), g),
    "copy_": lambda g, x: torch.zeros_like(x).copy_(g).mul_(x),
    "pow_": lambda g, x: g.clone().pow_(2).mul_(x),
    "clamp_": lambda g, x: g.clone().clamp_(-0.1, 0.1),
    "outer_max": lambda g, x: torch.maximum(g, x) * g,
    "linalg": lambda g, x: g * torch.linalg.vector_norm(g, dim=-1, keepdim=True),
    "histogram_free": lambda g, x: g * (g.abs() > 0.5 * g.abs().max()).to(g.dtype).mean(),
    "array": lambda g, x: torch.as_tensor(np.asarray(g) * 2.0) * x,
    "requires": lambda g, x: _inner(g, x),
    "tuple": lambda g, x: sum(part for part in (*g.split(1),)) * x[:1] + g,
    "half_rows": lambda g, x: torch.cat([g[: len(g) // 2], g[len(g) // 2 :] * 2]) * x,
    "swap": lambda g, x: g[torch.arange(len(g)).roll(1)] * x,
    "conv": lambda g, x: nn.functional.avg_pool1d(g.flatten(1)[:, None], 3, 1, 1).view(x.shape),
    "interleave": lambda g, x: g.repeat_interleave(2, -1)[..., ::2] * x,
    "expand": lambda g, x: g[None].expand(2, *g.shape).sum(0) * x,
    "diff": lambda g, x: torch.diff(g, dim=-1, prepend=g[..., :1]) * x + g,
    "einsum_pair": lambda g, x: torch.einsum("a...,b...->a...", g, x),
    "same_twice": lambda g, x: g + g,
    "minus_itself": lambda g, x: g - g,
    "print": lambda g, x: g * len(repr(tuple(g.shape))) * 0.1,
    "strided": lambda g, x: g.as_strided(g.shape, g.stride()) * x,
    "reshaped": lambda g, x: g.reshape(-1, x.shape[-1]).t().reshape(x.shape[-1], -1).t().reshape(x.shape) * x,
    "flatten_write": lambda g, x: _flat_write(g.clone(), x),
    "out": lambda g, x: torch.mul(g, x, out=torch.empty_like(x)),
    "reversed_minus": lambda g, x: 1 - g,
    "less": lambda g, x: (g < 0.05).to(x.dtype),
    "shape_walk": lambda g, x: torch.stack(list(g.unbind(0))) * x,
    "iterate": lambda g, x: torch.stack(list(g)) * x,
    "bitwise": lambda g, x: g.masked_fill((g > 0.01) & (x > 0), 0.1),
    "addmm": lambda g, x: torch.addmm(x.flatten(1), g.flatten(1) @ g.flatten(1).t(), x.flatten(1)).view_as(x),
}


def _assigned(out: Tensor, where: Any, value: Any) -> Tensor:
    out[where] = value
    return out


def _added(out: Tensor, x: Tensor) -> Tensor:
    out.transpose(0, -1)[0] += x.transpose(0, -1)[-1]
    out.select(-1, -1).mul_(2)
    return out


def _written(out: Tensor, x: Tensor) -> Tensor:
    view = out.flatten(1).t()
    view[0].fill_(0.5)
    view[-1:].add_(view[:1])
    return out * x


def _flat_write(out: Tensor, x: Tensor) -> Tensor:
    rows = out.view(out.shape)[..., :1]
    out.mul_(x)
    rows.add_(1)
    return out


def _inner(g: Tensor, x: Tensor) -> Tensor:
    """An autograd of its own, in the backward."""
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (found,) = torch.autograd.grad(y.sin(), y, g)
    return found


def _view_write(g: Tensor, x: Tensor) -> Tensor:
    out = g.clone()
    out[..., 0] = x[..., 0]
    out.flatten()[1:2] = 0.5
    return out
