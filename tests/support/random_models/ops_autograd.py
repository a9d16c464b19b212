"""Steps that use autograd itself: writes in place, checkpoints, detached parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import selbp
from support.random_models.context import Context, step

WRITES = (
    *(
        "add_",
        "mul_",
        "sub_",
        "div_",
        "relu_",
        "tanh_",
        "neg_",
        "square_",
        "exp_",
        "clamp_",
        "addcmul_",
        "masked_fill_",
    ),
    *("copy_", "slice", "view_mul", "zero_slice", "fill_slice", "select_add"),
)


@step("any")
def in_place(c: Context, x: Tensor) -> Tensor:
    """A chain of writes to a fresh tensor."""
    y, fresh = x * 1.0, False
    for _ in range(c.pick("writes", [1, 2, 3])):
        how = c.pick("how", WRITES)
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
