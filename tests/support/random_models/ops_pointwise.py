"""Steps that treat every element alike: they fit any shape, wherever the samples stand. And steps with two operands."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.random_models.context import Context, step, table

ACTIVATIONS = {
    **{name: getattr(F, name) for name in ("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "softplus")},
    **{name: getattr(F, name) for name in ("hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "logsigmoid")},
    **{name: getattr(F, name) for name in ("softsign", "softshrink", "hardshrink", "tanhshrink", "tanh", "sigmoid")},
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "threshold": lambda x: F.threshold(x, 0.1, 0.2),
    "rrelu_eval": lambda x: F.rrelu(x),
    "logit": lambda x: torch.logit(x.sigmoid(), eps=1e-3),
}
POINTWISE = {
    "exp": lambda x: (x * 0.3).exp(),
    "log": lambda x: (x * x + 1).log(),
    "log1p": lambda x: (x * x).log1p(),
    "sqrt": lambda x: (x * x + 1).sqrt(),
    "rsqrt": lambda x: (x * x + 1).rsqrt(),
    "pow": lambda x: x**3 * 0.1,
    "pow_tensor": lambda x: (x * x + 1) ** x.tanh(),
    "pow_base": lambda x: 1.5 ** x.tanh(),
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-0.5, 0.8),
    "clamp_min": lambda x: x.clamp_min(-0.2),
    "erf": lambda x: x.erf(),
    "sin_cos": lambda x: x.sin() * x.cos(),
    "reciprocal": lambda x: (x * x + 1).reciprocal(),
    "divide": lambda x: x / (x * x + 2),
    "rsub": lambda x: 1 - x,
    "atan2": lambda x: torch.atan2(x, x * x + 1),
    "maximum": lambda x: torch.maximum(x, x * x),
    "minimum": lambda x: torch.minimum(x, x.cos()),
    "fmod": lambda x: torch.fmod(x, 0.7),
    "remainder": lambda x: x.remainder(1.3),
    "floor_through": lambda x: x + (x.floor() - x).detach(),
    "lerp": lambda x: torch.lerp(x, x * x, 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x, value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x, x * x + 1),
    "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "where_scalar": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0.9, 0.4),
    "hypot": lambda x: torch.hypot(x, x * x + 1),
    "nan_to_num": lambda x: x.nan_to_num(),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "xlogy": lambda x: torch.xlogy(x, x * x + 1),
    "sinc": lambda x: torch.sinc(x * 0.3),
    "erfinv": lambda x: torch.erfinv(x.tanh() * 0.9),
    "digamma": lambda x: torch.digamma(x * x + 1),
    "asinh": lambda x: x.asinh(),
    "expm1": lambda x: (x * 0.3).expm1(),
    "positive_negative": lambda x: -(+x),
    "dirac": lambda x: torch.copysign(x, x.detach().roll(1, -1) if x.dim() else x),
    "frac": lambda x: x.frac(),
    "ldexp": lambda x: torch.ldexp(x, torch.tensor(-1)),
    "i0": lambda x: torch.special.i0e(x),
    "sgn": lambda x: x.sgn() * x,
}
EVERYWHERE = {**ACTIVATIONS, **POINTWISE}
table("any", EVERYWHERE)

# Functions of the last dim, which need not be a feature dim: a program may have put the samples there.
LAST_DIM = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmin": lambda x: F.softmin(x, -1),
    "logsumexp_last": lambda x: x.logsumexp(-1, keepdim=True) * x,
    "mean_last": lambda x: x - x.mean(-1, keepdim=True),
    "sum_last": lambda x: x.sum(-1, keepdim=True) * x * 0.2,
    "norm_last": lambda x: x / (x.norm(dim=-1, keepdim=True) + 0.1),
    "normalize": lambda x: F.normalize(x + 0.1, dim=-1),
    "var_last": lambda x: x.var(-1, keepdim=True, correction=0) * x,
    "amax_last": lambda x: x.amax(-1, keepdim=True) * x,
    "cumsum": lambda x: x.cumsum(-1) * 0.3,
    "flip_last": lambda x: x.flip(-1).sin() + x,
    "roll_last": lambda x: x.roll(1, -1) * x,
    "sort_last": lambda x: x.sort(-1)[0],
    "repeat_interleave": lambda x: x.repeat_interleave(2, -1)[..., : x.shape[-1]],
    "pad_last": lambda x: F.pad(x, (1, 1)).sin()[..., : x.shape[-1]],
    "outer_last": lambda x: (x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-1) * 0.2,
    "unfold_last": lambda x: x.unfold(-1, min(2, x.shape[-1]), 1).sum(-1).cos().repeat_interleave(2, -1),
    "first_of_last": lambda x: x * x[..., :1] + x[..., -1:],
    "strided_last": lambda x: torch.cat([x[..., ::2].sin(), x[..., 1::2] * 2], -1),
    "rotary": lambda x: x * 0.6 + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * 0.8,
}
table("any", {f"any_{name}": function for name, function in LAST_DIM.items()}, mixes=False)


@step("any")
def through_single(c: Context, x: Tensor) -> Tensor:
    c.store.single = True
    return x.float().sin().double()


@step("any")
def prelu(c: Context, x: Tensor) -> Tensor:
    return F.prelu(x, c.param(x.shape[1] if x.dim() > 1 and c.chance(0.5) else 1))


@step("any", draws=True)
def rrelu(c: Context, x: Tensor) -> Tensor:
    return F.rrelu(x, training=True)


@step("any", draws=True)
def dropout(c: Context, x: Tensor) -> Tensor:
    return c.pick("of", [F.dropout, F.alpha_dropout, F.feature_alpha_dropout])(x, 0.3, training=True)


@step("image", draws=True)
def channel_dropout(c: Context, x: Tensor) -> Tensor:
    return F.dropout2d(x, 0.3, training=True)


@step("vector")
def glu(c: Context, x: Tensor) -> Tensor:
    return F.glu(x, c.pick("dim", [1, -1])) * 2


@step("image")
def glu_channels(c: Context, x: Tensor) -> Tensor:
    return F.glu(x, 1) * 2


@step("any")
def broadcast_parameter(c: Context, x: Tensor) -> Tensor:
    shape = [size if c.chance(0.5) else 1 for size in x.shape[1:]]
    p = c.param(*([1] * c.chance(0.5)), *shape) if shape else c.param(1)
    how = c.pick("how", ["mul", "add", "div", "where", "maximum", "lerp", "addcmul", "sub"])
    if how == "mul":
        return x * p
    if how == "add":
        return p + x
    if how == "sub":
        return p - x
    if how == "div":
        return x / (p * p + 0.5)
    if how == "where":
        return torch.where(x.detach() > 0, x, p)
    if how == "maximum":
        return torch.maximum(p, x)
    if how == "lerp":
        return torch.lerp(x, p, torch.sigmoid(x))
    return torch.addcmul(p.expand(1, *x.shape[1:]), x, x, value=0.3)


@step("any")
def broadcast_up(c: Context, x: Tensor) -> Tensor:
    p = c.param(3, *[1] * x.dim())
    return (p * x).sum(0) if c.chance(0.5) else (x[None] * p).mean(0)


@step("any")
def broadcast_within(c: Context, x: Tensor) -> Tensor:
    """A factor of fewer dims than the tensor, or of size 1 in some."""
    dim = c.rng.randrange(1, x.dim()) if x.dim() > 1 else 0
    return x * x.mean(dim, keepdim=True).cos() if dim else x * 2


@step("any")
def residual(c: Context, x: Tensor) -> Tensor:
    other = c.earlier(x)
    how = c.pick("how", ["add", "sub", "mul", "gate", "maximum", "where", "alpha", "addcmul", "div", "lerp", "stack"])
    if how == "add":
        return x + other
    if how == "sub":
        return other - x
    if how == "mul":
        return x * other
    if how == "gate":
        return x * other.sigmoid() + other * (1 - x.sigmoid())
    if how == "maximum":
        return torch.maximum(x, other * 0.9)
    if how == "where":
        return torch.where(x > other, x, other * 0.5)
    if how == "alpha":
        return torch.add(x, other, alpha=0.5)
    if how == "addcmul":
        return torch.addcmul(x, other, x, value=0.3)
    if how == "div":
        return x / (other * other + 1)
    if how == "lerp":
        return torch.lerp(x, other, 0.25)
    return torch.stack([x, other], 1).sum(1) if c.chance(0.5) else torch.stack([x, other], -1).prod(-1)


@step("any")
def scaled_by_scalar_parameter(c: Context, x: Tensor) -> Tensor:
    p = c.param()
    return x * p + p.exp() if c.chance(0.5) else x * nn.functional.softplus(p) - x / (1 + p * p)


@step("any")
def per_sample_constant(c: Context, x: Tensor) -> Tensor:
    k = c.per_sample(*[size if c.chance(0.6) else 1 for size in x.shape[1:]])
    how = c.pick("how", ["mul", "masked_fill", "where", "clamp", "sub"])
    if how == "mul":
        return x * k
    if how == "masked_fill":
        return x.masked_fill(k > 0.3, 0.0)
    if how == "where":
        return torch.where(k > 0, x, k)
    if how == "clamp":
        return x.clamp(k - 1, k + 1)
    return k - x
