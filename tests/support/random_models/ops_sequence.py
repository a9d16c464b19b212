"""Steps on sequences: attention, recurrent networks, embeddings; reductions and orders within a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.random_models.context import Context, step, table


def has_derivative() -> bool:
    try:
        torch.aminmax(torch.ones(2, requires_grad=True))[0].backward()
    except RuntimeError:
        return False
    return True


def least_and_greatest(x: Tensor, **along: int) -> tuple[Tensor, Tensor]:
    """``torch.aminmax``; its two halves where this torch has no derivative of it, as in 2.11 and older."""
    return torch.aminmax(x, **along) if AMINMAX else (x.amin(**along), x.amax(**along))


AMINMAX = has_derivative()

table(
    "vector",
    {
        "std": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 0.5),
        "var_mean": lambda x: sum(torch.var_mean(x, 1, keepdim=True)) * x,
        "norm_1": lambda x: x / (x.norm(1, -1, keepdim=True) + 1),
        "norm_inf": lambda x: x / (x.norm(float("inf"), -1, keepdim=True) + 1),
        "norm_3": lambda x: x / (torch.linalg.vector_norm(x, 3, -1, keepdim=True) + 1),
        "max_value": lambda x: x.max(-1, keepdim=True)[0] * x,
        "min_value": lambda x: x.min(1)[0][:, None] - x,
        "median": lambda x: x.median(-1, keepdim=True)[0] * x,
        "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True)[0] * x,
        "mode_free_quantile": lambda x: x.quantile(0.4, 1, keepdim=True) * x,
        "topk": lambda x: x.topk(3, -1)[0],
        "topk_small": lambda x: x.topk(2, 1, largest=False)[0].exp() * 0.5,
        "sort_down": lambda x: x.sort(1, descending=True)[0].sin(),
        "msort_last": lambda x: x.argsort(1).double() * 0.1 + x,
        "prod": lambda x: x.prod(-1, keepdim=True) * x,
        "cumprod": lambda x: x.cumprod(-1),
        "cummax": lambda x: x.cummax(1)[0] + x.cummin(1)[0],
        "logcumsumexp": lambda x: x.logcumsumexp(-1),
        "aminmax": lambda x: sum(least_and_greatest(x, dim=1, keepdim=True)) * x,
        "diff": lambda x: x.diff(dim=1).sin(),
        "trapezoid": lambda x: torch.trapezoid(x, dim=1)[:, None] * x,
        "cosh": lambda x: x.cosh() * 0.2,
        "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(-1) + 0.5, dim=-1).unsqueeze(1) * x,
        "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(-1) + 0.5, keepdim=True) * x * 0.3,
        "cdist_within": lambda x: torch.cdist(x.unflatten(1, (2, -1)), x.unflatten(1, (2, -1)) + 1).flatten(1),
        "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:4]),
        "solve": lambda x: torch.linalg.solve(
            torch.eye(2, dtype=x.dtype) * 3 + x[:, :4].reshape(-1, 2, 2).tanh(), x[:, :2, None]
        ).flatten(1),
        "inverse_det": lambda x: (
            torch.linalg.det(torch.eye(2, dtype=x.dtype) * 2 + x[:, :4].reshape(-1, 2, 2).tanh())[:, None] * x
        ),
        "matrix_exp": lambda x: torch.matrix_exp(x[:, :4].reshape(-1, 2, 2).tanh()).flatten(1),
        "cholesky": lambda x: torch.linalg.cholesky(
            torch.eye(2, dtype=x.dtype) + x[:, :2, None] * x[:, None, :2]
        ).flatten(1),
        "cov_within": lambda x: (x.unflatten(1, (2, -1)) @ x.unflatten(1, (2, -1)).mT).flatten(1) * 0.3,
        "gumbel_free_one_hot": lambda x: x.softmax(1) + (F.one_hot(x.argmax(1), x.shape[1]) - x.softmax(1)).detach(),
    },
)


@step("sequence")
def reduce_any(c: Context, x: Tensor) -> Tensor:
    over = c.pick("over", [1, 2, (1, 2), -1])
    how = c.pick("how", ["sum", "mean", "amax", "logsumexp", "norm", "var"])
    keep = c.chance(0.5)
    options = {"correction": 0} if how == "var" else {}
    function = torch.linalg.vector_norm if how == "norm" else getattr(torch, how)
    out = function(x, dim=over, keepdim=keep, **options)
    return x * out if keep else out.reshape(c.n, -1)


# ---------------------------------------------------------------------------------------------------------- attention
@step("sequence")
def attention(c: Context, x: Tensor) -> Tensor:
    """scaled_dot_product_attention in its many forms."""
    n, t, d = x.shape
    heads = c.pick("heads", [1, 2])
    source = c.pick("from", ["one", "projection", "earlier", "steps_first"])
    if source == "projection":
        q, k, v = (x @ c.param(d, 3 * d)).view(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        other = c.earlier(x) if source == "earlier" else x
        split = [y.reshape(n, t, heads, d // heads).transpose(1, 2) for y in (x * 2, other, other)]
        if source == "steps_first":
            split = [y.transpose(0, 2).contiguous().transpose(0, 2) for y in split]
        q, k, v = split
    mask = c.pick("mask", ["none", "causal", "shared_bool", "shared", "per_sample", "learned", "learned_heads", "data"])
    bias, causal = None, mask == "causal"
    if mask == "shared_bool":
        bias = torch.ones(t, t, dtype=torch.bool).tril()
    elif mask == "shared":
        bias = c.const(1, 1, t, t)
    elif mask == "per_sample":
        bias = c.per_sample(1, t, t)
    elif mask == "learned":
        bias = c.param(t, t)
    elif mask == "learned_heads":
        bias = c.param(1, heads, t, t)
    elif mask == "data":
        bias = x.mean(2)[:, None, None, :].expand(n, heads, t, t)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    return out.transpose(1, 2).reshape(n, t, d)


@step("sequence", draws=True)
def attention_dropout(c: Context, x: Tensor) -> Tensor:
    y = x[:, None]
    return F.scaled_dot_product_attention(y * 2, y, y, dropout_p=0.2).squeeze(1)


@step("sequence")
def attention_by_hand(c: Context, x: Tensor) -> Tensor:
    scores = x @ c.earlier(x).mT / 2
    if c.chance(0.5):
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ x


@step("sequence")
def multihead(c: Context, x: Tensor) -> Tensor:
    d, first = x.shape[2], c.pick("batch_first", [True, False])
    options = c.pick("options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": d}])
    layer = c.module(lambda: nn.MultiheadAttention(d, 2, batch_first=first, **options))
    x = x if first else x.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[int(first)], dtype=x.dtype)
    mask = mask if c.chance(0.4) else None
    out, weights = layer(x, x, x, need_weights=c.pick("weights", [True, False]), attn_mask=mask)
    out = out if first else out.transpose(0, 1)
    return out if weights is None else torch.cat([out, weights], -1)


@step("sequence")
def encoder_layer(c: Context, x: Tensor) -> Tensor:
    d, first = x.shape[2], c.pick("batch_first", [True, False])
    pre = c.pick("norm_first", [True, False])
    layer = c.module(
        lambda: nn.TransformerEncoderLayer(d, 2, 8, 0.0, batch_first=first, norm_first=pre, layer_norm_eps=1e-2)
    )
    return layer(x) if first else layer(x.transpose(0, 1)).transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------- recurrence
@step("sequence")
def recurrent(c: Context, x: Tensor) -> Tensor:
    d, kind = x.shape[2], c.pick("kind", [nn.LSTM, nn.GRU, nn.RNN])
    first, two, both = (c.pick(name, [True, False]) for name in ("batch_first", "layers_2", "bidirectional"))
    layer = c.module(lambda: kind(d, 3, 1 + two, batch_first=first, bidirectional=both, bias=c.key is not None))
    out, state = layer(x if first else x.transpose(0, 1))
    out = out if first else out.transpose(0, 1)
    if c.pick("output", ["all", "last", "state"]) == "state":
        state = state[0] if isinstance(state, tuple) else state
        return state.transpose(0, 1).reshape(c.n, -1)
    return out if c.chance(0.5) else out[:, -1]


@step("sequence")
def lstm_single(c: Context, x: Tensor) -> Tensor:
    """In float32 a CPU runs a fused layer."""
    c.store.single = True
    d, two, both = x.shape[2], c.pick("layers_2", [True, False]), c.pick("bidirectional", [True, False])
    layer = c.module(lambda: nn.LSTM(d, 3, 1 + two, batch_first=True, bidirectional=both), torch.float32)
    out, (state, cell) = layer(x.float())
    return {"out": out, "state": state.transpose(0, 1), "cell": cell.transpose(0, 1)}[
        c.pick("output", ["out", "state", "cell"])
    ].double()


@step("sequence")
def cells(c: Context, x: Tensor) -> Tensor:
    kind = c.pick("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    cell = c.module(lambda: kind(x.shape[2], 3))
    state = None
    for t in range(x.shape[1]):
        state = cell(x[:, t], state)
    return torch.cat(state, 1) if isinstance(state, tuple) else state


# ---------------------------------------------------------------------------------------------------------- embeddings
@step("sequence", weight=10)
def embedding(c: Context, x: Tensor) -> Tensor:
    """Rows of a table, chosen by the data."""
    table_, at = c.param(5, x.shape[2]), (x.detach()[..., 0] * 2).long().clamp(0, 4)
    how = c.pick(
        "how", ["embedding", "padding", "index", "pair", "one_hot", "bag", "bag_max", "bag_sum", "index_select"]
    )
    if how == "embedding":
        return x + F.embedding(at, table_)
    if how == "padding":
        return x + F.embedding(at, table_, padding_idx=0)
    if how == "index":
        return x * table_[at]
    if how == "pair":
        return x.sum(2) + table_[at, (at + 1) % 4]
    if how == "one_hot":
        return x + F.one_hot(at, 5).to(x.dtype) @ table_
    if how == "index_select":
        return x + table_.index_select(0, at.flatten()).view_as(x)
    mode = {"bag": "mean", "bag_max": "max", "bag_sum": "sum"}[how]
    weights = x.mean(2).sigmoid() if mode == "sum" else None
    return x.mean(1) + F.embedding_bag(at, table_, mode=mode, per_sample_weights=weights)


@step("sequence", mixes=True)
def embedding_by_frequency(c: Context, x: Tensor) -> Tensor:
    at = (x.detach()[..., 0] * 2).long().clamp(0, 4)
    return x + F.embedding(at, c.param(5, x.shape[2]), scale_grad_by_freq=True)


@step("sequence", mixes=True)
def embedding_bag_offsets(c: Context, x: Tensor) -> Tensor:
    at = c.ints(5, c.n * 2)
    return x.mean(1) + F.embedding_bag(
        at, c.param(5, x.shape[2]), torch.arange(c.n) * 2, mode=c.pick("mode", ["sum", "mean"])
    )


@step("sequence")
def positions(c: Context, x: Tensor) -> Tensor:
    return (
        x + c.param(*x.shape[1:]) if c.chance(0.5) else torch.cat([c.param(1, 1, x.shape[2]).expand(c.n, -1, -1), x], 1)
    )


@step("vector")
def mixture(c: Context, x: Tensor) -> Tensor:
    """Experts weighted by a gate, or hard routing by index."""
    gate = F.linear(x, c.param(3, x.shape[1])).softmax(-1)
    experts = torch.einsum("bd,kde->bke", x, c.param(3, x.shape[1], 4))
    if c.pick("hard", [True, False]):
        best, which = gate.topk(2, -1)
        chosen = experts.gather(1, which[..., None].expand(-1, -1, 4))
        return (chosen * best[..., None]).sum(1)
    return (gate[..., None] * experts).sum(1)


@step("vector")
def routed(c: Context, x: Tensor) -> Tensor:
    """Samples go to one of two layers, by boolean index."""
    first = x.detach()[:, 0] > 0
    out = x.new_zeros(c.n, 4)
    out[first] = F.linear(x[first], c.param(4, x.shape[1]))
    return out.index_put((~first,), F.linear(x[~first], c.param(4, x.shape[1])).tanh())
