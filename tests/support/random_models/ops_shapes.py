"""Steps that move elements: views, joins, padding, indexing within a sample, and regions with another layout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from support.random_models.context import Context, step, table
from support.random_models.ops_pointwise import EVERYWHERE, LAST_DIM

table(
    "vector",
    {
        "chunk_cat": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(2, -1), 1)], -1),
        "split_parts": lambda x: x.split([1, x.shape[1] - 1], -1)[1] * x[:, :1],
        "tensor_split": lambda x: torch.cat([part.sin() for part in x.tensor_split(3, 1)][::-1], 1),
        "stack_flatten": lambda x: torch.stack([x, x * 2], 1).flatten(1),
        "stack_last": lambda x: torch.stack([x.sin(), x], -1).flatten(1),
        "unbind_sum": lambda x: sum(part * i for i, part in enumerate(x.unflatten(1, (2, -1)).unbind(1), 1)),
        "getitem_step": lambda x: x[:, ::2],
        "getitem_int": lambda x: x[:, 3].unsqueeze(1) * x,
        "getitem_list": lambda x: x[:, [0, 3, 3, 1]],
        "getitem_none": lambda x: x[:, None, :, None].sin().squeeze(3).squeeze(1),
        "getitem_ellipsis": lambda x: x[..., 1:-1],
        "getitem_mask": lambda x: x[:, torch.arange(x.shape[1]) % 3 != 1],
        "index_select": lambda x: x.index_select(1, torch.tensor([1, 1, 3, 0])),
        "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
        "gather_own": lambda x: x.gather(1, x.argsort(1)[:, :3]),
        "scatter_own": lambda x: torch.zeros_like(x).scatter(1, x.argsort(1), x.sin()),
        "scatter_add_own": lambda x: x.new_zeros(len(x), 4).scatter_add(1, x.argsort(1) % 4, x),
        "scatter_reduce": lambda x: x.new_zeros(len(x), 4).scatter_reduce(1, x.argsort(1) % 4, x, "mean"),
        "scatter_amax": lambda x: x.new_zeros(len(x), 4).scatter_reduce(1, x.argsort(1) % 4, x, "amax"),
        "expand_reshape": lambda x: x.unsqueeze(1).expand(-1, 3, -1).reshape(len(x), -1),
        "repeat": lambda x: x.repeat(1, 2),
        "tile": lambda x: x.tile(1, 3),
        "flip": lambda x: x.flip(-1).exp() * 0.1,
        "roll": lambda x: x.roll((2,), (1,)) * x,
        "pad": lambda x: F.pad(x, (1, 2)),
        "pad_negative": lambda x: F.pad(x, (-1, 2), value=0.5),
        "pad_circular": lambda x: F.pad(x[:, None], (1, 2), mode="circular").flatten(1),
        "pad_reflect": lambda x: F.pad(x[:, None], (1, 2), mode="reflect").flatten(1),
        "pad_replicate": lambda x: F.pad(x[:, None], (1, 2), mode="replicate").flatten(1),
        "tril": lambda x: x.reshape(len(x), 2, -1).tril().flatten(1),
        "triu": lambda x: x.unflatten(1, (2, -1)).triu() * x[:, :1, None],
        "diag_embed": lambda x: torch.diag_embed(x)[:, :2].flatten(1),
        "diagonal": lambda x: x.unflatten(1, (2, -1)).diagonal(0, 1, 2).exp(),
        "diagonal_offset": lambda x: (x[:, :, None] * x[:, None]).diagonal(1, 1, 2),
        "unfold_windows": lambda x: x.unfold(1, 3, 1).flatten(1),
        "squeeze_dims": lambda x: x[:, None, :, None].squeeze((1, 3)).unsqueeze(1).squeeze(1) * x,
        "as_strided": lambda x: x.contiguous().as_strided((len(x), x.shape[1] // 2), (x.shape[1], 2)) * 1,
        "as_strided_overlap": lambda x: torch.as_strided(
            x.contiguous() * 1, (len(x), x.shape[1] - 1, 2), (x.shape[1], 1, 1)
        ).sin(),
        "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 3),
        "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 1, 3),
        "diagonal_scatter": lambda x: torch.diagonal_scatter(x.unflatten(1, (2, -1)), x[:, :2].sin(), 0, 1, 2),
        "masked_select_back": lambda x: torch.zeros_like(x).masked_scatter(x > 0, x[x > 0]),
        "hstack": lambda x: torch.hstack([x, x[:, :1]]),
        "cartesian": lambda x: (x[:, :, None] + x[:, None, :]).flatten(1)[:, :16],
        "bucket": lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype)),
        "broadcast_to": lambda x: x[:, None].broadcast_to(len(x), 2, x.shape[1]).clone(),
        "view_as": lambda x: x.reshape(len(x), 2, -1).contiguous().view_as(x.unflatten(1, (2, -1))),
        "combinations": lambda x: torch.block_diag(x[:, :2].sum(0) * 0 + 1, x.new_ones(1)).sum() * x,
    },
)
table(
    "sequence",
    {
        "flatten": lambda x: x.flatten(1),
        "transpose_steps": lambda x: x.transpose(1, 2),
        "movedim": lambda x: x.movedim(2, 1).sin(),
        "swapaxes_flatten": lambda x: x.swapaxes(1, 2).reshape(len(x), -1),
        "select_step": lambda x: x.select(1, -1),
        "narrow_steps": lambda x: x.narrow(1, 1, x.shape[1] - 1) * x[:, :1],
        "roll_steps": lambda x: x.roll((1, 2), (1, 2)),
        "rot90": lambda x: torch.rot90(x, 1, (1, 2)),
        "steps_gather": lambda x: x.gather(1, x.argsort(1)[:, :2]),
        "advanced_pair": lambda x: x[:, [0, 1], [1, 2]],
        "advanced_apart": lambda x: x[:, None][:, [0, 0], :, [1, 2]].movedim(0, 1),
        "advanced_grid": lambda x: x[:, torch.tensor([[0], [1]]), torch.tensor([[1, 0, 2]])],
        "stack_steps": lambda x: torch.stack([step.sin() for step in x.unbind(1)][::-1], 1),
        "cumulative_steps": lambda x: x.cumsum(1) * 0.4,
        "tril_steps": lambda x: x.tril() + x.triu(1) * 2,
        "repeat_steps": lambda x: x.repeat_interleave(torch.tensor([2] + [1] * (x.shape[1] - 1)), 1),
        "kron": lambda x: torch.kron(x.contiguous(), torch.tensor([[1.0, -0.5]], dtype=x.dtype)),
        "trace": lambda x: torch.einsum("bii->b", x[:, :2, :2])[:, None] * x.flatten(1),
    },
)


@step("vector", mixes=True)
def squeeze_all(c: Context, x: Tensor) -> Tensor:
    """Where there is one sample, its dim goes too."""
    return x[:, None, :, None].squeeze().reshape(x.shape).sin()


@step("vector")
def index_put(c: Context, x: Tensor) -> Tensor:
    c.store.mixes = True  # it writes to samples by number
    where = (c.ints(len(x), 3), c.ints(x.shape[1], 3))
    return x.index_put(where, c.param(3), accumulate=c.pick("accumulate", [True, False]))


@step("sequence")
def index_put_features(c: Context, x: Tensor) -> Tensor:
    at = torch.arange(2)
    out = x.clone()
    if c.chance(0.5):
        out[:, :, at] = x[:, :, at + 1].sin()
    else:
        out[..., at] += x[..., at + 2] * 2
    return out


@step("vector")
def index_copy(c: Context, x: Tensor) -> Tensor:
    at = torch.tensor([2, 0])
    how = c.pick("how", ["index_copy", "index_add", "index_fill", "index_reduce"])
    if how == "index_copy":
        return x.index_copy(1, at, x[:, :2].sin())
    if how == "index_add":
        return x.index_add(1, at, x[:, 1:3], alpha=0.5)
    if how == "index_fill":
        return x.index_fill(1, at, 0.3)
    return x.index_reduce(1, at, x[:, 1:3], "mean")


@step("any")
def join_earlier(c: Context, x: Tensor) -> Tensor:
    other = c.earlier(x)
    dim = c.rng.randrange(1, x.dim()) if x.dim() > 1 else None
    if dim is None:
        return torch.stack([x, other], 1)
    if c.chance(0.3):
        return torch.cat([c.param(1, *x.shape[1:]).expand_as(x), x, other], dim)
    return torch.cat([x, other], dim)


LAYOUTS = {
    "samples_last": (lambda x: x.movedim(0, -1), lambda y: y.movedim(-1, 0)),
    "samples_last_copied": (lambda x: x.movedim(0, -1).contiguous(), lambda y: y.movedim(-1, 0).contiguous()),
    "steps_first": (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1)),
    "steps_first_copied": (lambda x: x.transpose(0, 1).contiguous(), lambda y: y.transpose(0, 1)),
}


def _folded(c: Context, x: Tensor) -> tuple[Tensor, tuple[int, ...], str]:
    """A sequence (n, T, d) with the samples' dim folded with another."""
    n, steps, width = x.shape
    how = c.pick("fold", ["n*T", "T*n", "n*heads", "heads*n", "T,n*heads", "d,n*T", "T*n,d2"])
    if how == "n*T":
        return x.reshape(n * steps, width), (n, steps, width), "012"
    if how == "T*n":
        return x.transpose(0, 1).reshape(steps * n, width), (steps, n, width), "102"
    half = width // 2
    if how == "n*heads":
        return x.reshape(n, steps, 2, half).transpose(1, 2).reshape(n * 2, steps, half), (n, 2, steps, half), "0213"
    if how == "heads*n":
        return x.reshape(n, steps, 2, half).permute(2, 0, 1, 3).reshape(2 * n, steps, half), (2, n, steps, half), "1203"
    if how == "T,n*heads":
        return x.transpose(0, 1).reshape(steps, n * 2, half), (steps, n, 2, half), "1023"
    if how == "d,n*T":
        return x.permute(2, 0, 1).reshape(width, n * steps), (width, n, steps), "120"
    return x.transpose(0, 1).reshape(steps * n, 2, half).transpose(0, 1), (2, steps, n, half), "2103"


def _within(c: Context, y: Tensor, mixing: bool) -> Tensor:
    """One to three steps that fit any shape."""
    functions = {**EVERYWHERE, **(LAST_DIM if mixing else {})}
    for _ in range(c.pick("steps", [1, 2, 3])):
        before = y.shape
        y = functions[c.pick("of", functions)](y)
        if y.shape != before:
            y = y.expand(before) if y.numel() < before.numel() else y[tuple(slice(0, size) for size in before)]
    return y


@step("sequence", mixes=True)
def moved_samples(c: Context, x: Tensor) -> Tensor:
    there, back = LAYOUTS[c.pick("layout", LAYOUTS)]
    return back(_within(c, there(x), True))


@step("sequence", mixes=True)
def folded_samples(c: Context, x: Tensor) -> Tensor:
    y, shape, order = _folded(c, x)
    y = _within(c, y, True)
    if c.chance(0.4):
        y = y @ c.param(y.shape[-1], y.shape[-1])
    return y.reshape(shape).permute([int(axis) for axis in order]).reshape(x.shape)


@step("sequence")
def folded_independent(c: Context, x: Tensor) -> Tensor:
    y, shape, order = _folded(c, x)
    return _within(c, y, False).reshape(shape).permute([int(axis) for axis in order]).reshape(x.shape)


@step("vector")
def three_blocks(c: Context, x: Tensor) -> Tensor:
    y = torch.cat([x, x * 2, x.sin()], 0)
    y = _within(c, y, False) if c.chance(0.5) else F.linear(y, c.param(4, x.shape[1]))
    if c.chance(0.5):
        return sum(part * i for i, part in enumerate(y.chunk(3), 1))
    return y.view(3, c.n, -1).transpose(0, 1).flatten(1)
