"""Steps that use autograd itself: writes in place, functions of one's own, hooks, checkpoints, detached parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from model_context import Context, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selbp


@step("any")
def in_place(c: Context, x: Tensor) -> Tensor:
    """A chain of writes to a fresh tensor."""
    y, fresh = x * 1.0, False
    for _ in range(c.pick("writes", [1, 2, 3])):
        how = c.pick("how", ["add_", "mul_", "relu_", "tanh_", "masked_fill_", "slice", "clamp_", "sub_", "div_", "copy_",
                             "addcmul_", "neg_", "view_mul", "zero_slice", "fill_slice", "square_", "exp_", "select_add"])  # fmt: skip
        y = y * 1.0 if fresh else y  # a result that an earlier write saved must stay
        part = y.select(-1, 0) if c.chance(0.3) and y.shape[-1] > 1 else y
        fresh = how in ("relu_", "tanh_", "exp_")
        if how in ("relu_", "tanh_", "neg_", "square_"):
            getattr(part, how)()
        elif how == "exp_":
            part.mul_(0.3).exp_()
        elif how in ("add_", "mul_", "sub_"):
            getattr(y, how)(c.earlier(y))
        elif how == "div_":
            y.div_(c.earlier(y).square() + 1)
        elif how == "addcmul_":
            y.addcmul_(x, x, value=0.3)
        elif how == "masked_fill_":
            y.masked_fill_(x.detach() > 0.4, 0.2)
        elif how == "clamp_":
            part.clamp_(-1, 1)
        elif how == "copy_":
            part.copy_(x.select(-1, 0) if part is not y else x.sin())
        elif how == "slice":
            y[..., 1:] = x[..., :-1] * 2
        elif how == "view_mul":
            y.transpose(0, -1).mul_(1.5)
        elif how == "zero_slice":
            y[..., :1].zero_()
        elif how == "fill_slice":
            y[..., -1].fill_(0.5)
        else:
            y[..., 0] += x[..., -1]
    return y


@step("vector")
def assembled(c: Context, x: Tensor) -> Tensor:
    """A result that is filled piece by piece."""
    out = torch.zeros(c.n, 8, dtype=x.dtype) if c.chance(0.5) else x.new_empty(c.n, 8).fill_(0.1)
    out[:, :4] = x[:, :4] * 2
    how = c.pick("how", ["column", "index", "mask", "index_add_", "scatter_", "index_put_", "step", "samples", "view"])
    if how == "column":
        out[:, 5] = x[:, 1]
    elif how == "index":
        out[:, [4, 6]] = x[:, :2].sin()
    elif how == "mask":
        out[:, 4:][x[:, :4] > 0] = 0.3
    elif how == "index_add_":
        out.index_add_(1, torch.tensor([1, 7]), x[:, 2:4])
    elif how == "scatter_":
        out.scatter_(1, torch.tensor([[5, 6]]).expand(c.n, 2), x[:, 2:4])
    elif how == "index_put_":
        out.index_put_((torch.arange(c.n), torch.arange(c.n) % 8), x[:, 0], accumulate=True)
        c.store.mixes = True
    elif how == "step":
        out[:, 1::3] += x[:, :3]
    elif how == "samples":
        out[0] = x[-1, 0]
        c.store.mixes = True
    else:
        out.view(c.n, 2, 4)[:, 1, 1:3] = x[:, :2].exp() * 0.3
    return out


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
    "to": lambda g, x: g.to(torch.float32).to(g.dtype) * x,
    "detach": lambda g, x: g.detach() * x.cos(),
    "equal": lambda g, x: g * (2.0 if torch.equal(g, g.clone()) else 1.0),
    "allclose": lambda g, x: g * (2.0 if torch.allclose(g, torch.zeros_like(x)) else 1.0),
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


@step("any", mixes=True)
def own_function(c: Context, x: Tensor) -> Tensor:
    return Own.apply(x, c.pick("backward", BACKWARDS))


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
    "float": lambda g: g.float().double(),
    "relu": lambda g: torch.relu(g),
    "sum_all": lambda g: g + g.sum(),
    "max_scale": lambda g: g / (g.abs().max() + 1),
}


def _clone_write(g: Tensor) -> Tensor:
    out = g.clone()
    out[:, :1].mul_(3)
    out[..., 0].fill_(0.1)
    return out


@step("any", mixes=True)
def hook(c: Context, x: Tensor) -> Tensor:
    if x.requires_grad:
        x = x * 1
        x.register_hook(HOOKS[c.pick("hook", HOOKS)])
    return x


@step("any", mixes=True)
def hook_two(c: Context, x: Tensor) -> Tensor:
    """A tensor with two hooks that is read twice."""
    if x.requires_grad:
        x = x * 1
        for _ in range(2):
            x.register_hook(HOOKS[c.pick("hook", HOOKS)])
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


@step("any")
def detached(c: Context, x: Tensor) -> Tensor:
    how = c.pick("how", ["factor", "summand", "through", "no_grad", "reversal", "constant"])
    if how == "factor":
        return x * x.detach().cos()
    if how == "summand":
        return x + c.earlier(x).detach()
    if how == "through":
        return (x.round() - x).detach() + x
    if how == "no_grad":
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True) + 1
        return x / scale
    if how == "reversal":
        return 2 * x.detach() - x
    return x.detach() + c.param(x.shape[-1])


@step("any")
def inner_gradient(c: Context, x: Tensor) -> Tensor:
    """An inner autograd.grad of its own, detached."""
    y = x.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(y.sin().sum(), y)
    return x * g


def _block(c: Context, x: Tensor) -> nn.Module:
    d = x.shape[-1]
    blocks = {
        "mlp": lambda: nn.Sequential(nn.Linear(d, 6), nn.Tanh(), nn.Linear(6, d)),
        "norm": lambda: nn.Sequential(nn.LayerNorm(d, eps=1e-2), nn.GELU()),
        "gate": lambda: nn.Sequential(nn.Linear(d, 2 * d), nn.GLU(-1)),
    }
    return c.module(blocks[c.pick("block", blocks)])


@step("any")
def torch_checkpoint(c: Context, x: Tensor) -> Tensor:
    block, reentrant = _block(c, x), c.pick("reentrant", [True, False])
    if c.chance(0.3):
        return checkpoint(lambda y, z: block(y) * z, x, c.earlier(x), use_reentrant=reentrant)
    return checkpoint(block, x, use_reentrant=reentrant)


@step("any")
def rows_checkpoint(c: Context, x: Tensor) -> Tensor:
    """Plain torch runs the block as it is."""
    block = _block(c, x)
    return selbp.checkpoint(block, x) if c.rows else block(x)


@step("any", draws=True)
def checkpoint_with_dropout(c: Context, x: Tensor) -> Tensor:
    block = nn.Sequential(_block(c, x), nn.Dropout(0.3))
    return checkpoint(block, x, use_reentrant=c.pick("reentrant", [True, False]))


@step("any")
def fence(c: Context, x: Tensor) -> Tensor:
    return selbp.fence(x) if c.rows else x
