"""The op-by-op cases: name -> (per-sample input shape, function of an (n, ...) tensor).

Every case is differentiated with respect to a leaf *below* it, so that a gradient lost or mixed up on the way shows,
and in float64, so that an exact rule agrees to rounding. ``DENSIFY`` (in ``test_ops``) lists, by case, the operators
known to have no row-sparse form there; a rule that stops applying, or starts to, changes the set and fails the test.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = 6
F64 = torch.float64
Function = Callable[[Tensor], Tensor]


def _ramp(*shape: int) -> Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=F64).view(shape) / 3


class Lambda(nn.Module):
    """A function with parameters."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_children()))


class Own(nn.Module):
    """A function of the input and one parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(_ramp(*shape) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p)


ACTIVATIONS: dict[str, Function] = {
    **{name.lower(): getattr(nn, name)() for name in ("ReLU", "GELU", "SiLU", "Sigmoid", "Tanh", "Hardswish", "Mish")},
    **{name.lower(): getattr(nn, name)() for name in ("Hardsigmoid", "LeakyReLU", "ELU", "SELU", "CELU", "Softplus")},
    **{name.lower(): getattr(nn, name)() for name in ("ReLU6", "LogSigmoid", "Softsign", "Softshrink", "Hardshrink")},
    **{name.lower(): getattr(nn, name)() for name in ("Tanhshrink", "Hardtanh", "RReLU")},
    "relu_in_place": nn.ReLU(inplace=True),
    "gelu_tanh": nn.GELU("tanh"),
    "prelu": nn.PReLU(8),
    "glu": nn.GLU(-1),
    "softmax": nn.Softmax(-1),
    "log_softmax": nn.LogSoftmax(-1),
    "softmin": nn.Softmin(-1),
    "dropout": nn.Dropout(0.3),
    "alpha_dropout": nn.AlphaDropout(0.2),
    "layer_norm": nn.LayerNorm(8),
    "rms_norm": nn.RMSNorm(8),
    "swiglu": Own(lambda x, p: F.silu(x @ p) * (x @ p.flip(0)), 8, 8),
    "threshold": nn.Threshold(0.1, 0.2),
    "logit": lambda x: torch.logit(x.sigmoid(), eps=1e-3),
}

POINTWISE: dict[str, Function] = {
    "exp": lambda x: x.exp(),
    "log": lambda x: (x * x + 1).log(),
    "sqrt": lambda x: (x * x + 1).sqrt(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "pow": lambda x: x**3,
    "pow_tensor": lambda x: (x * x + 1) ** x,
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "erf": lambda x: x.erf(),
    "sin_cos": lambda x: x.sin() * x.cos(),
    "reciprocal": lambda x: (x * x + 1).reciprocal(),
    "div": lambda x: x / (x * x + 2),
    "rsub": lambda x: 1 - x,
    "atan2": lambda x: torch.atan2(x, x * x + 1),
    "maximum": lambda x: torch.maximum(x, x * x),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1),
    "where_zero": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "where_both": lambda x: torch.where(x > 0, x, x * 0.1),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0.3, 0.0),
    "masked_fill_value": lambda x: x.masked_fill(x > 0.3, 7.0),
    "detached_factor": lambda x: x.detach() * x,
    "broadcast_down": lambda x: x * x.sum(-1, keepdim=True),
    "broadcast_up": lambda x: (x[None] * _ramp(3, 1, 8)).sum(0),
    "in_place": lambda x: (x * 2).mul_(3).add_(x),
    "straight_through": lambda x: x + (x.round() - x).detach(),
}

REDUCTIONS: dict[str, Function] = {
    "sum": lambda x: x.sum(-1, keepdim=True) * x,
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "var": lambda x: x.var(-1, keepdim=True) * x,
    "std": lambda x: (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True),
    "norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "amax": lambda x: x.amax(-1, keepdim=True) * x,
    "max": lambda x: x.max(-1, keepdim=True)[0] * x,
    "median": lambda x: x.median(-1, keepdim=True)[0] * x,
    "topk": lambda x: x.topk(3, -1)[0],
    "sort": lambda x: x.sort(-1)[0],
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True) * x,
    "prod": lambda x: x.prod(-1, keepdim=True) * x,
    "cumsum": lambda x: x.cumsum(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x.flip(-1), dim=-1).unsqueeze(1) * x,
    "pairwise_distance": lambda x: F.pairwise_distance(x, x.flip(-1), keepdim=True) * x,
    "cdist": lambda x: torch.cdist(x.view(N, 2, 4), x.view(N, 4, 2).mT.contiguous() + 1).flatten(1),
}

SHAPES: dict[str, Function] = {
    "chunk_cat": lambda x: torch.cat([part * i for i, part in enumerate(x.chunk(2, -1), 1)], -1),
    "split": lambda x: x.split([3, 5], -1)[0],
    "stack": lambda x: torch.stack([x, x * 2], 1).flatten(1),
    "unbind": lambda x: sum(x.view(N, 2, 4).unbind(1)),
    "getitem": lambda x: x[:, 2:5],
    "getitem_step": lambda x: x[:, ::2],
    "getitem_int": lambda x: x[:, 3].unsqueeze(1) * x,
    "getitem_list": lambda x: x[:, [0, 3, 3]],
    "getitem_all": lambda x: x[:],
    "gather": lambda x: x.gather(1, torch.arange(2 * N).view(N, 2) % 8),
    "index_select": lambda x: x.index_select(1, torch.tensor([1, 1, 4])),
    "take_along": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
    "scatter": lambda x: torch.zeros(N, 10, dtype=F64).scatter(1, torch.arange(8).expand(N, 8), x),
    "scatter_add": lambda x: torch.zeros(N, 4, dtype=F64).scatter_add(1, (torch.arange(8) % 4).expand(N, 8), x),
    "expand": lambda x: x.unsqueeze(1).expand(N, 3, 8).reshape(N, 24),
    "repeat": lambda x: x.repeat(1, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "tile": lambda x: x.tile(1, 3),
    "flip": lambda x: x.flip(-1) * _ramp(8),
    "roll": lambda x: x.roll(2, -1) * _ramp(8),
    "pad": lambda x: F.pad(x, (1, 2)),
    "pad_value": lambda x: F.pad(x, (1, 2), value=3.0),
    "pad_circular": lambda x: F.pad(x.view(N, 1, 8), (1, 2), mode="circular").flatten(1),
    "tril": lambda x: x.view(N, 2, 4).tril().flatten(1),
    "diag_embed": lambda x: torch.diag_embed(x).flatten(1),
    "diagonal": lambda x: (x.view(N, 2, 4) * _ramp(2, 4)).diagonal(0, 1, 2),
    "unfold_windows": lambda x: x.unfold(1, 3, 2).flatten(1),
    "movedim": lambda x: x.view(N, 2, 4).movedim(1, 2).flatten(1) * _ramp(8),
    "squeeze": lambda x: x.view(N, 1, 8, 1).squeeze() * x,
    "batch_times_steps": lambda x: (x.view(N * 2, 4) * _ramp(N * 2, 1)).view(N, 8),
    "steps_times_batch": lambda x: (
        (x.view(N, 2, 4).transpose(0, 1).reshape(2 * N, 4) * _ramp(N * 2, 1)).view(2, N, 4).transpose(0, 1).flatten(1)
    ),
    "batch_in_the_middle": lambda x: (
        (x.view(N, 2, 2, 2).permute(1, 0, 2, 3).reshape(2, N * 2, 2) * _ramp(2, N * 2, 1))
        .view(2, N, 2, 2)
        .permute(1, 0, 2, 3)
        .flatten(1)
    ),
    "batch_last": lambda x: (x.t().contiguous() * _ramp(8, N)).t().flatten(1),
    "three_blocks": lambda x: torch.cat([x, x * 2, x * x], 0).view(3, N, 8).transpose(0, 1).flatten(1),
    "full_like": lambda x: x * torch.full_like(x, 2.0) + torch.ones_like(x),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0] * 2, 1, 3),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2] * 2, 1, 3, 5),
    "chunked_in_place": lambda x: _assign(x),
    "part_zeroed": lambda x: _after(x, lambda y: y[:, 2:5].zero_()),
    "part_filled": lambda x: _after(x, lambda y: y[:, 2].fill_(3.0)),
    "part_scaled": lambda x: _after(x, lambda y: y[:, ::2].mul_(3)),
    "part_by_another": lambda x: _after(x, lambda y: y[:, :4].mul_(y[:, 4:].clone())),
    "part_activated": lambda x: _after(x, lambda y: F.relu_(y[:, 1:6])),
    "part_of_a_view": lambda x: _after(x, lambda y: y.view(N, 2, 4)[:, 1].add_(x[:, :4].sin())),
    "part_transposed": lambda x: _after(x, lambda y: y.t()[3].copy_(x[:, 0])),
    "part_of_heads": lambda x: _after(x, lambda y: y.view(N * 2, 4)[:, 1].mul_(2)),
    "part_masked": lambda x: _after(x, lambda y: y[:, 2:7].masked_fill_(x[:, :5].detach() > 0, 0.0)),
    "part_indexed": lambda x: _after(x, lambda y: y[:, 2:7].index_add_(1, torch.tensor([0, 2]), x[:, :2])),
    "part_of_the_samples": lambda x: _after(x, lambda y: y[2:4].mul_(3)),
    "one_sample_assigned": lambda x: _after(x, lambda y: y[1].copy_(x[3])),
    "every_part": lambda x: _after(torch.empty_like(x), lambda y: [y[:, i].copy_(x[:, i] * i) for i in range(8)]),
    "complex": lambda x: torch.fft.rfft(x, dim=-1).abs(),
    "view_as_complex": lambda x: torch.view_as_real(torch.view_as_complex(x.view(N, 4, 2)) * (1 + 2j)).flatten(1),
}


def _after(x: Tensor, write: Callable[[Tensor], object]) -> Tensor:
    """A copy of ``x`` after a write in place to a part of it."""
    out = x * 1
    write(out)
    return out * _ramp(8)


def _assign(x: Tensor) -> Tensor:
    out = torch.zeros(N, 8, dtype=x.dtype)
    out[:, :4] = x[:, 4:] * 2
    out[:, 5] = x[:, 1]
    return out + x


PRODUCTS: dict[str, Function] = {
    "linear": nn.Linear(8, 5),
    "linear_no_bias": nn.Linear(8, 5, bias=False),
    "bilinear": Lambda(lambda x, m: m(x, x), m=nn.Bilinear(8, 8, 3)),
    "matmul": lambda x: (x.view(N, 2, 4) @ x.view(N, 4, 2)).flatten(1),
    "bmm": lambda x: torch.bmm(x.view(N, 2, 4), x.view(N, 4, 2)).flatten(1),
    "outer": lambda x: (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1),
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, x).flatten(1),
    "einsum_heads": Own(lambda x, p: torch.einsum("bhi,hij->bhj", x.view(N, 2, 4), p).flatten(1), 2, 4, 4),
    "addmm": Own(lambda x, p: torch.addmm(p[0], x, p), 8, 8),
    "baddbmm": lambda x: torch.baddbmm(x.view(N, 2, 4), x.view(N, 2, 4), x.view(N, 4, 2) @ x.view(N, 2, 4)).flatten(1),
    "mv": Own(lambda x, p: (x @ p).unsqueeze(1) * x, 8),
    "parameter_first": Own(lambda x, p: (p @ x.t()).t(), 5, 8),
    "weight_transposed": Own(lambda x, p: F.linear(x, p.t()), 8, 5),
    "dot": Own(lambda x, p: x * torch.dot(p, p), 8),
    "outer_batch": Own(lambda x, p: (p[:, None, None] * x).sum(0), 3),
    "samples_contracted_twice": lambda x: x @ (x.t() @ x).detach(),
}
