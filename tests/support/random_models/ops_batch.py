"""Steps in which the samples of a minibatch meet: the gradient of one sample's loss reaches others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.random_models.context import Context, step, table

table(
    "vector",
    {
        "batch_mean": lambda x: x - x.mean(0),
        "batch_mean_kept": lambda x: x * x.mean(0, keepdim=True),
        "batch_sum_scalar": lambda x: x * x.sum() * 0.1,
        "batch_std": lambda x: x / (x.std(0, correction=0) + 0.5),
        "batch_softmax": lambda x: x.softmax(0) * 2,
        "batch_log_softmax": lambda x: x.log_softmax(0),
        "batch_logsumexp": lambda x: x - x.logsumexp(0),
        "batch_max": lambda x: x - x.max(0)[0],
        "batch_amax": lambda x: x * x.amax((0, 1)),
        "batch_median": lambda x: x - x.median(0)[0],
        "batch_renorm": lambda x: x.renorm(2, 0, 1.5),
        "batch_norm_value": lambda x: x / (x.norm() + 1),
        "batch_prod": lambda x: x * x.prod(0),
        "batch_cumsum": lambda x: x.cumsum(0) * 0.3,
        "batch_cumprod": lambda x: x.cumprod(0),
        "batch_cummax": lambda x: x.cummax(0)[0],
        "batch_logcumsumexp": lambda x: x.logcumsumexp(0) * 0.4,
        "batch_sort": lambda x: x.sort(0)[0],
        "batch_flip": lambda x: x.flip(0).sin(),
        "batch_roll": lambda x: x.roll(1, 0) * x,
        "batch_roll_all": lambda x: x.roll(1),
        "batch_diff": lambda x: torch.cat([x[:1], x.diff(dim=0)]),
        "batch_first": lambda x: x * x[0],
        "batch_last_slice": lambda x: x + x[-1:],
        "batch_halves": lambda x: torch.cat([x[: len(x) // 2] * 2, x[len(x) // 2 :].sin()]),
        "batch_every_second": lambda x: x.index_add(0, torch.arange(len(x))[::2], x[::2].sin()),
        "batch_picked": lambda x: x[torch.arange(len(x)).flip(0)] * 0.5 + x[torch.zeros(len(x), dtype=torch.long)],
        "batch_index_select": lambda x: x.index_select(0, (torch.arange(len(x)) * 2) % len(x)),
        "batch_gather": lambda x: x.gather(0, x.argsort(0)),
        "batch_split": lambda x: torch.cat([part.softmax(0) for part in x.split(1)][::-1]),
        "batch_chunk": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(2), 1)]),
        "batch_unbind": lambda x: torch.stack([row * i for i, row in enumerate(x.unbind(), 1)]),
        "batch_view": lambda x: x.reshape(-1).softmax(0).view_as(x) * 3,
        "batch_fold": lambda x: x.reshape(x.shape[1], len(x)).sin().reshape(x.shape),
        "batch_as_features": lambda x: x.t().reshape(-1).reshape(x.shape).cos(),
        "batch_repeat": lambda x: x.repeat(2, 1)[len(x) // 2 : len(x) // 2 + len(x)],
        "batch_interleave": lambda x: x.repeat_interleave(2, 0)[1 : len(x) + 1],
        "batch_gram": lambda x: F.log_softmax(x @ x.t(), 1) @ x * 0.3,
        "batch_attention": lambda x: (x @ x.t()).softmax(-1) @ x,
        "batch_similarity": lambda x: F.normalize(x + 0.1, dim=1) @ F.normalize(x + 0.1, dim=1).t() @ x,
        "batch_covariance": lambda x: x @ (x.t() @ x) * 0.1,
        "batch_cov": lambda x: x @ torch.cov(x.t(), correction=0) * 0.2,
        "batch_cdist": lambda x: torch.cdist(x, x[:1].detach() + 1) * x * 0.2,
        "batch_distances": lambda x: ((x[:, None] - x[None]) ** 2).sum(-1).neg().exp() @ x,
        "batch_pdist": lambda x: x * (F.pdist(x * torch.arange(1.0, 1 + len(x))[:, None]).sum() * 0.05 + 1),
        "batch_einsum": lambda x: torch.einsum("bd,ce->bd", x, x) * 0.1,
        "batch_matmul_3d": lambda x: (x[None] @ x.t()[None] @ x[None]).squeeze(0) * 0.2,
        "batch_diagonal": lambda x: (x @ x.t()).diagonal()[:, None] * 0.2 + x,
        "batch_tril": lambda x: torch.tril(x @ x.t()) @ x * 0.2,
        "batch_unfold": lambda x: x.unfold(0, 1, 1).flatten(1) * 2,
        "batch_pad": lambda x: F.pad(x, (0, 0, 1, 0))[:-1] + x,
        "batch_as_strided": lambda x: (x * 1).as_strided((len(x), x.shape[1]), (1, len(x))).sin(),
        "batch_scatter": lambda x: torch.zeros_like(x).scatter_add(0, x.argsort(0) // 2, x),
        "batch_masked_select": lambda x: torch.zeros_like(x).masked_scatter(x < 0, x[x < 0] * 2) + x,
        "batch_conv": lambda x: (
            F.conv1d(x.t()[None], torch.ones(x.shape[1], 1, 3, dtype=x.dtype), padding=1, groups=x.shape[1])[0].t()
            * 0.3
        ),
        "batch_layer_norm": lambda x: F.layer_norm(x.t(), (len(x),), eps=0.1).t(),
        "batch_expand_self": lambda x: (x[None].expand(3, -1, -1) * torch.arange(3.0)[:, None, None]).sum(0),
    },
    mixes=True,
)


@step("image", mixes=True)
def batch_norm(c: Context, x: Tensor) -> Tensor:
    """In training mode. One sample of one position has no variance."""
    channels, how = x.shape[1], c.pick("how", ["2d", "1d", "3d", "plain", "functional"])
    if how == "2d":
        return c.module(lambda: nn.BatchNorm2d(channels, eps=1e-2))(x)
    if how == "1d":
        return c.module(lambda: nn.BatchNorm1d(channels, eps=1e-2))(x.flatten(2))
    if how == "3d":
        return c.module(lambda: nn.BatchNorm3d(channels, eps=1e-2))(x.unsqueeze(2)).squeeze(2)
    if how == "plain":
        return c.module(lambda: nn.BatchNorm2d(channels, affine=False, eps=1e-2))(x)
    return F.batch_norm(x, None, None, c.param(channels), c.param(channels), training=True, eps=1e-2)


@step("vector", mixes=True)
def batch_mixed_by_weights(c: Context, x: Tensor) -> Tensor:
    """A matrix over the samples, (n, n)."""
    how = c.pick("how", ["mm", "sparse", "coo", "linear", "einsum", "conv"])
    mix = c.const(c.n, c.n)
    if how == "mm":
        return mix @ x * 0.4
    if how == "sparse":
        return torch.sparse.mm((mix * (mix > 0)).to_sparse_csr(), x) * 0.4
    if how == "coo":
        return torch.sparse.mm((mix * (mix > 0)).to_sparse(), x) * 0.4
    if how == "linear":
        return F.linear(x.t(), c.param(c.n, c.n), c.param(c.n)).t()
    if how == "einsum":
        return torch.einsum("ab,bd->ad", c.param(c.n, c.n), x)
    return F.conv1d(x[None], c.param(c.n, c.n, 1))[0]


@step("sequence")
def graph_within(c: Context, x: Tensor) -> Tensor:
    """A sparse adjacency over the steps of each sample."""
    adjacency = c.const(x.shape[1], x.shape[1])
    adjacency = adjacency * (adjacency > 0)
    if c.pick("how", ["fold", "one_by_one"]) == "fold":
        folded = x.transpose(0, 1).reshape(x.shape[1], -1)
        return torch.sparse.mm(adjacency.to_sparse(), folded).view(x.shape[1], c.n, -1).transpose(0, 1)
    return torch.stack([torch.sparse.mm(adjacency.to_sparse_csr(), row) for row in x])


@step("vector", mixes=True)
def batch_other(c: Context, x: Tensor) -> Tensor:
    """An earlier value of the same samples meets this one."""
    other = c.earlier(x)
    how = c.pick("how", ["similarity", "cdist", "cat_samples", "swap", "cross", "where"])
    if how == "similarity":
        return (x @ other.t()).tanh() @ other * 0.4
    if how == "cdist":
        return torch.cdist(x, other + 2) @ x * 0.1
    if how == "cat_samples":
        return torch.cat([x, other]).cumsum(0)[c.n // 2 : c.n // 2 + c.n] * 0.3
    if how == "swap":
        return x * other.flip(0)
    if how == "cross":
        return torch.einsum("bd,cd->b", x, other)[:, None] * 0.2 + x
    return torch.where(torch.arange(c.n)[:, None] % 2 == 0, x, other)
