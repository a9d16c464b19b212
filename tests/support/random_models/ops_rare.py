"""Rarer steps: decompositions, ragged sequences, transforms inside a model, learned sparse matrices, hooks of nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

from support.random_models.context import Context, step, table


def _square(x: Tensor) -> Tensor:
    """(n, 2, 2) well-conditioned matrices."""
    return torch.eye(2, dtype=x.dtype) * 2 + x[:, :4].reshape(-1, 2, 2).tanh() * 0.5


def _symmetric(x: Tensor) -> Tensor:
    """(n, 2, 2) with eigenvalues apart."""
    a = x[:, :4].reshape(-1, 2, 2).tanh() * 0.2
    return a + a.mT + torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=x.dtype)


table(
    "vector",
    {
        "linalg_inv": lambda x: torch.linalg.inv(_square(x)).flatten(1),
        "linalg_qr": lambda x: torch.linalg.qr(_square(x))[1].flatten(1),
        "linalg_eigh": lambda x: torch.linalg.eigh(_symmetric(x))[0],
        "linalg_svdvals": lambda x: torch.linalg.svdvals(_symmetric(x)),
        "linalg_slogdet": lambda x: torch.linalg.slogdet(_square(x))[1][:, None] * x,
        "linalg_pinv": lambda x: torch.linalg.pinv(_square(x)).flatten(1),
        "linalg_solve_triangular": lambda x: torch.linalg.solve_triangular(
            _square(x).tril(), x[:, :2, None], upper=False
        ).flatten(1),
        "linalg_matrix_power": lambda x: torch.linalg.matrix_power(_square(x) * 0.4, 3).flatten(1),
        "linalg_norm_matrix": lambda x: torch.linalg.matrix_norm(_square(x))[:, None] * x,
        "cholesky_solve": lambda x: torch.cholesky_solve(
            x[:, :2, None], torch.linalg.cholesky(_symmetric(x)), upper=False
        ).flatten(1),
        "householder": lambda x: (
            x - 2 * F.normalize(x + 1, dim=1) * (F.normalize(x + 1, dim=1) * x).sum(1, keepdim=True)
        ),
        "gradient": lambda x: torch.gradient(x, dim=1)[0],
        "cumulative_trapezoid": lambda x: torch.cumulative_trapezoid(x, dim=1),
        "nansum": lambda x: x.nansum(1, keepdim=True) * x * 0.2,
        "nanmean": lambda x: x - x.nanmean(1, keepdim=True),
        "std_mean": lambda x: sum(torch.std_mean(x, 1, keepdim=True)) * x,
        "amin": lambda x: x.amin(1, keepdim=True) - x,
        "scatter_prod": lambda x: (x.new_ones(len(x), 4)).scatter_reduce(1, x.argsort(1) % 4, x, "prod"),
        "scatter_amin": lambda x: x.new_zeros(len(x), 4).scatter_reduce(1, x.argsort(1) % 4, x, "amin"),
        "scatter_value": lambda x: x.scatter(1, x.argsort(1)[:, :1], 0.5),
        "index_fill_scalar": lambda x: x.index_fill(1, torch.tensor([1]), 0.3),
        "put_along": lambda x: x.scatter(1, x.argsort(1)[:, :2], x[:, :2].sin()),
        "logsumexp_pair": lambda x: torch.logaddexp2(x, x.roll(1, 1)),
        "heaviside_gate": lambda x: torch.heaviside(x.detach(), x.new_zeros(())) * x,
        "vmap_rows": lambda x: torch.vmap(lambda row: row.sin() * row.sum())(x) * 0.3,
        "vmap_grad": lambda x: x * torch.func.vmap(torch.func.grad(lambda row: row.sin().sum()))(x.detach()),
        "multilabel_view": lambda x: x.unflatten(1, (2, -1)).flatten(0, 1).softmax(1).unflatten(0, (len(x), 2)),
        "chained_views": lambda x: x.view_as(x).t().t()[None].expand(2, -1, -1).permute(1, 2, 0).flatten(1).cos(),
        "swap_and_split": lambda x: torch.cat(x.t().split(2)[::-1]).t().sin(),
        "dsplit": lambda x: torch.cat(torch.hsplit(x, 2)[::-1], 1),
        "column_stack": lambda x: torch.column_stack([x, x[:, 0]]),
        "bitwise_where": lambda x: torch.where((x > 0) & (x < 1), x.square(), x.abs()),
        "polygamma": lambda x: torch.polygamma(1, x * x + 1),
        "lgamma": lambda x: torch.lgamma(x * x + 1),
        "erfcx": lambda x: torch.special.erfcx(x * x),
        "log_ndtr": lambda x: torch.special.log_ndtr(x),
        "ndtri": lambda x: torch.special.ndtri(x.sigmoid() * 0.9 + 0.05),
        "entr": lambda x: torch.special.entr(x.sigmoid()),
        "bessel": lambda x: torch.special.i1e(x),
    },
)
table(
    "image",
    {
        "fractional_free_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, 1, return_indices=True), 2, 1),
        "lp_pool_1d": lambda x: F.lp_pool1d(x.flatten(2).abs() + 0.1, 2.0, 2),
        "grid_sample_nearest": lambda x: F.grid_sample(
            x, x[:, :2].movedim(1, -1).tanh(), mode="nearest", padding_mode="border", align_corners=True
        ),
        "grid_sample_3d": lambda x: F.grid_sample(
            x[:, :, None], x[:, :3, None].movedim(1, -1).tanh(), align_corners=False
        ).squeeze(2),
        "reflect_3d": lambda x: F.pad(x[:, None], (1, 1, 1, 1, 1, 1), mode="reflect").flatten(1, 2),
        "upsample_3d": lambda x: F.interpolate(x[:, :1], scale_factor=2).squeeze(1),
        "upsample_nearest_3d": lambda x: F.interpolate(x[:, None, :2, :2, :2], scale_factor=2).flatten(1, 2),
        "bicubic_antialias": lambda x: F.interpolate(x, size=(2, 2), mode="bicubic", antialias=True),
        "unfold_fold": lambda x: F.fold(F.unfold(x, 2), x.shape[2:], 2),
        "per_channel_loop": lambda x: torch.stack([x[:, i].mT @ x[:, i] for i in range(2)], 1) * 0.3,
    },
)


@step("sequence", mixes=True)
def packed(c: Context, x: Tensor) -> Tensor:
    """A packed sequence: what is stored is sorted by length, and samples lie between one another."""
    kind = c.pick("kind", [nn.LSTM, nn.GRU])
    layer = c.module(lambda: kind(x.shape[2], 3, batch_first=True, bidirectional=True))
    lengths = c.ints(x.shape[1], c.n) + 1
    out, _ = layer(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]


@step("sequence")
def decoder_layer(c: Context, x: Tensor) -> Tensor:
    layer = c.module(lambda: nn.TransformerDecoderLayer(x.shape[2], 2, 8, 0.0, batch_first=True, layer_norm_eps=1e-2))
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return layer(x, c.earlier(x), tgt_mask=mask, tgt_is_causal=True)


@step("sequence", mixes=True)
def padded_attention(c: Context, x: Tensor) -> Tensor:
    layer = c.module(lambda: nn.MultiheadAttention(x.shape[2], 2, batch_first=True))
    padding = torch.arange(x.shape[1])[None] > c.ints(x.shape[1], c.n)[:, None]
    return layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]


@step("sequence", draws=True)
def random_choices(c: Context, x: Tensor) -> Tensor:
    how = c.pick("how", ["gumbel", "gumbel_hard", "noise", "bernoulli", "normal", "fractional_pool", "dropout1d"])
    if how.startswith("gumbel"):
        return F.gumbel_softmax(x, hard=how == "gumbel_hard")
    if how == "noise":
        return x + torch.randn_like(x) * x.sigmoid()
    if how == "bernoulli":
        return x * torch.bernoulli(torch.full_like(x, 0.5))
    if how == "normal":
        return torch.distributions.Normal(x, x.exp() * 0.1 + 0.1).rsample()
    if how == "dropout1d":
        return F.dropout1d(x, 0.4, training=True)
    return F.fractional_max_pool2d(c.fit(x, 2, 4, 4), 2, output_size=2)


@step("vector")
def learned_sparse(c: Context, x: Tensor) -> Tensor:
    """A sparse matrix whose values are parameters."""
    at = torch.stack([c.ints(3, 5), c.ints(x.shape[1], 5)])
    matrix = torch.sparse_coo_tensor(at, c.param(5), (3, x.shape[1])).coalesce()
    return torch.sparse.mm(matrix, x.t()).t()


@step("any")
def saved_tensor_hooks(c: Context, x: Tensor) -> Tensor:
    """What is saved is kept elsewhere: a copy, another dtype, the host's memory."""
    how = c.pick("how", ["copy", "list", "cpu"])
    pack: Any = {"copy": lambda t: t.clone(), "list": lambda t: (t.dtype, t.tolist()), "cpu": lambda t: t}[how]
    unpack: Any = {"list": lambda kept: torch.tensor(kept[1], dtype=kept[0])}.get(how, lambda t: t)
    p = c.param(x.shape[-1])
    if how == "cpu":
        with torch.autograd.graph.save_on_cpu():
            return (x.sin() * p).tanh()
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return (x.sin() * p).tanh()


@step("any")
def parametrized(c: Context, x: Tensor) -> Tensor:
    d, how = x.shape[-1], c.pick("how", ["orthogonal", "spectral_eval", "weight_norm", "functional"])
    make = {
        "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(d, 3)),
        "spectral_eval": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(d, 3)).eval(),
        "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(d, 3)),
        "functional": lambda: nn.Linear(d, 3),
    }
    layer = c.module(make[how])
    if how == "functional":
        return torch.func.functional_call(layer, {"weight": c.param(3, d).tanh(), "bias": c.param(3)}, (x,))
    return layer(x)


@step("any")
def node_hooks(c: Context, x: Tensor) -> Tensor:
    """Hooks of graph nodes, before and after they run; both scale."""
    x = (x * 1.5).sin()
    if not x.requires_grad:
        return x
    scale = lambda grads: tuple(None if g is None else g * 0.5 for g in grads)  # noqa: E731
    if c.pick("when", ["before", "after"]) == "before":
        x.grad_fn.register_prehook(scale)  # type: ignore[union-attr]
    else:
        x.grad_fn.register_hook(lambda made, given: scale(made))  # type: ignore[union-attr]
    return x


@step("any", mixes=True)
def hooks_that_meet(c: Context, x: Tensor) -> Tensor:
    """A gradient that one hook keeps, and another, further down, uses."""
    kept: list[Tensor] = []
    x = x * 1
    if not x.requires_grad:
        return x.tanh() * 1.1
    how = c.pick("how", ["add", "mul", "mean", "cat", "write"])

    def use(g: Tensor | None) -> Tensor | None:
        if g is None or not kept:
            return None
        other = kept[-1]
        if how == "add":
            return g + 0.5 * other
        if how == "mul":
            return g * (1 + other)
        if how == "mean":
            return g - other.mean()
        if how == "cat":
            return torch.cat([g, other], -1)[..., : g.shape[-1]] * 0.5
        other.mul_(0.5)
        return g + other

    x.register_hook(use)
    y = x.tanh() * 1.1
    y.register_hook(lambda g: None if g is None else kept.append(g.clone() if how == "write" else g))
    return y
