"""Random inputs for every operator: shapes, strides, dtypes, values and options. ``bounds`` says what must come out."""

import random
from unittest import mock

import torch

from selbp import ops
from selbp.ops import _skipped_tiles
from selbp.ops import choose_rows as row_choice
from support import bounds

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 100)
INF, NAN = float("inf"), float("nan")
SPECIAL = (NAN, INF, -INF, 1e-40, -1e-45, 1e30, -1e30, 6e4, 0.0, -0.0)


class Draw:
    """One case's chance."""

    def __init__(self, seed):
        self.random, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)

    def size(self, least=0, most=100):
        return self.random.choice([s for s in SIZES if least <= s <= most])

    def choice(self, *values):
        return self.random.choice(values)

    def tensor(self, *shape, dtype=torch.float32, special=0.3):
        """Normal values of some scale, in some layout, a few of them special."""
        x = torch.randn(*shape, generator=self.torch, dtype=torch.float64) * self.choice(0.0, 1e-3, 1.0, 1.0, 3.0, 30.0)
        if x.numel() and self.random.random() < special:
            for _ in range(self.random.randint(1, 3)):
                x.view(-1)[self.random.randrange(x.numel())] = self.choice(*SPECIAL)
        return self.layout(x.to(dtype))

    def layout(self, x):
        """The same values with other strides."""
        kind = self.choice("plain", "plain", "transposed", "sliced", "stepped", "offset", "negative", "expanded")
        if kind == "transposed" and x.dim() >= 2:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "sliced" and x.dim():
            return torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]]
        if kind == "stepped" and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == "offset":
            return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
        if kind == "negative" and x.is_floating_point():
            return torch._neg_view(-x)
        if kind == "expanded" and x.dim() and len(x):
            return x[:1].expand(x.shape)
        return x

    def target(self, n, n_classes, ignore_index):
        y = torch.randint(0, n_classes, (n,), generator=self.torch)
        y[torch.rand(n, generator=self.torch) < self.choice(0.0, 0.2, 1.0)] = ignore_index
        return self.layout(y)

    def loss_options(self, n_classes, dtype):
        weight = None
        if self.choice(True, False):
            weight = torch.rand(n_classes, generator=self.torch).to(dtype)
            weight[torch.rand(n_classes, generator=self.torch) < 0.1] = 0.0
        return {
            "class_weight": weight,
            "ignore_index": self.choice(-100, -1, 0, n_classes - 1, n_classes + 3, 10**12),
            "label_smoothing": self.choice(0.0, 0.0, 0.1, 0.5, 1.0),
            "softcap": self.choice(0.0, 0.0, 1.0, 20.0),
        }


def labels(draw, n, n_classes, dtype):
    options = draw.loss_options(n_classes, dtype)
    return draw.target(n, n_classes, options["ignore_index"]), options


def cross_entropy_statistics(draw):
    n, n_classes, dtype = draw.size(), draw.size(least=1), draw.choice(*DTYPES)
    target, options = labels(draw, n, n_classes, dtype)
    features = draw.choice(None, draw.tensor(n, draw.size(), dtype=dtype))
    logits = draw.tensor(n, n_classes, dtype=dtype)
    a = {"logits": logits, "target": target, "features": features, **options, "bias": draw.choice(True, False)}
    bounds.cross_entropy_statistics(a, ops.cross_entropy_statistics(**a))


def residual(draw):
    n, n_classes, dtype = draw.size(), draw.size(least=1), draw.choice(*DTYPES)
    target, options = labels(draw, n, n_classes, dtype)
    logits = draw.tensor(n, n_classes, dtype=dtype)
    lse = ops.cross_entropy_statistics(logits, target, **options).lse
    # In an expanded layout the log-sum-exp is another row's: then nothing is known but the zeros.
    other = ops.residual(logits, target, draw.layout(lse), **options)
    assert (other[target == options["ignore_index"]] == 0).all() and other.shape == logits.shape
    a = {"logits": logits, "target": target, "lse": lse, **options}
    bounds.residual(a, ops.residual(**a))


def head(draw, n, dtype):
    d, n_classes = draw.size(), draw.size(least=1)
    features, weight = draw.tensor(n, d, dtype=dtype), draw.tensor(n_classes, d, dtype=dtype, special=0.05)
    bias = draw.choice(None, draw.tensor(n_classes, dtype=dtype, special=0.05))
    target, options = labels(draw, n, n_classes, dtype)
    return {"features": features, "weight": weight, "bias": bias, "target": target, **options}


def linear_cross_entropy_statistics(draw):
    a = head(draw, draw.size(), draw.choice(*DTYPES))
    bounds.linear_cross_entropy_statistics(a, ops.linear_cross_entropy_statistics(**a))


def linear_cross_entropy(draw):
    n, dtype = draw.size(), draw.choice(*DTYPES)
    a = head(draw, n, dtype)
    a["rows"] = draw.choice(None, torch.randint(0, n, (draw.size(),), generator=draw.torch) if n else None)
    a["skip_mass"] = draw.choice(0.0, 0.01, 0.3, 1.0)
    leaves = {name: a[name].detach().requires_grad_() for name in ("features", "weight", "bias") if a[name] is not None}
    with mock.patch.object(_skipped_tiles, "COLUMNS", 16):
        check_head(draw, a, leaves)


def check_head(draw, a, leaves):
    n = len(a["features"])
    loss, stats = ops.linear_cross_entropy(**{**a, **leaves}, return_statistics=True)
    exact, valid = bounds.linear_cross_entropy(a, (loss, stats))
    upstream = torch.randn(n, generator=draw.torch).to(loss.dtype) * (torch.rand(n, generator=draw.torch) < 0.7)
    found = torch.autograd.grad(loss, list(leaves.values()), upstream)
    finite = torch.isfinite(a["weight"].double()).all()
    if not finite or (exact.valid & ~valid).any() or not torch.equal(valid, stats.valid):
        return  # a weight that is not finite spoils the products; a row at the edge of the type decides by rounding
    bounds.linear_cross_entropy_gradients(a, stats.valid, exact, upstream, found)


def factors(draw):
    n, dtype = draw.size(), draw.choice(*DTYPES)
    r, h = draw.tensor(n, draw.size(), dtype=dtype), draw.tensor(n, draw.size(), dtype=dtype)
    return {"residual": r, "features": h, "bias": draw.choice(True, False)}


def gradient_gram(draw):
    a = factors(draw)
    bounds.gradient_gram(a, ops.gradient_gram(**a))


def mean_gradient(draw):
    a = factors(draw)
    bounds.mean_gradient(a, ops.mean_gradient(**a))


def matching_residual(draw):
    a = factors(draw)
    n, k = len(a["residual"]), draw.size()
    indices = torch.randint(-1, n, (k,), generator=draw.torch) if n else torch.full((k,), -1)
    weights = draw.tensor(k, special=0.0)
    indices = draw.layout(indices) if k < 2 else indices
    ours = ops.matching_residual(a["residual"], a["features"], ops.Selection(indices, weights), bias=a["bias"])
    bounds.matching_residual({**a, "indices": indices, "weights": weights}, ours)


def gram_problem(draw, batch):
    n, p, dtype = draw.size(most=33), draw.size(least=1, most=17), draw.choice(*DTYPES)
    g = torch.randn(*batch, n, p, generator=draw.torch, dtype=torch.float64) + draw.choice(0.0, 0.3)
    g = g * draw.choice(1e-8, 1.0, 1.0, 1e6 if dtype in DTYPES[:2] else 1.0)
    if n > 2 and draw.choice(True, False):
        g[..., 1, :] = g[..., 0, :]  # a row twice
    mean = g.mean(-2) if n else g.sum(-2)
    gram, inner = (g @ g.mT).to(dtype), (g @ mean[..., None])[..., 0].to(dtype)
    return gram, inner, mean.square().sum(-1).to(dtype)


def match(draw):
    batch = draw.choice((), (), (3,), (0,))
    gram, inner, target_sq = gram_problem(draw, batch)
    n, k = inner.shape[-1], draw.choice(0, 1, 2, 5, inner.shape[-1], inner.shape[-1] + 3)
    valid = draw.choice(None, torch.rand(n, generator=draw.torch) < 0.8)
    if inner.numel() and draw.random.random() < 0.1:
        inner.view(-1)[draw.random.randrange(inner.numel())] = draw.choice(NAN, INF)
    nonnegative = draw.choice(True, False)
    gram = draw.layout(gram) if not batch else gram
    options = {"rule": draw.choice("ols", "normalized", "raw"), "ridge": draw.choice(0.0, 1e-6, 1e-3, 0.1)}
    a = {"gram": gram, "inner": inner, "target_sq": target_sq, "k": k, **options, "nonnegative": nonnegative}
    a |= {"valid": valid, "tolerance": draw.choice(0.0, 0.0, 0.3)}
    bounds.match(a, ops.match(**a))


def nnls(draw):
    m, n, dtype = draw.size(most=33), draw.size(most=17), draw.choice(*DTYPES)
    a = torch.randn(m, n, generator=draw.torch, dtype=torch.float64).to(dtype)
    b = draw.tensor(m, dtype=dtype, special=0.0)
    if m and n:
        a = draw.layout(a)
    found = {"a": a, "b": b, "ridge": 0.0}
    bounds.nnls(found, ops.nnls(**found))


def sketch(draw):
    n, length, dtype = draw.size(most=9), draw.size(most=9), draw.choice(torch.float32, torch.float64)
    a = head(draw, n * length, dtype)
    features, weight, bias, target = (a.pop(name) for name in ("features", "weight", "bias", "target"))
    width = features.shape[1] + (bias is not None)
    left, right = ops.sketch_projections(len(weight), width, (3, 5), seed=1, dtype=dtype)
    features, target = features.reshape(n, length, features.shape[1]), target.reshape(n, length)
    ours = ops.sketch(features, weight, bias, target, (left, right), **a)
    given = {"features": features, "weight": weight, "bias": bias, "target": target, "left": left, "right": right}
    bounds.sketch({**given, **a}, ours)


def choose_rows(draw):
    n = draw.size(least=1)
    score = draw.tensor(n, dtype=torch.float64)
    valid, k = torch.rand(n, generator=draw.torch) < draw.choice(0.0, 0.5, 1.0), draw.choice(1, 2, n, max(1, n // 2))
    rule, weights = draw.choice("top", "odds", "rank"), draw.choice("mean", "batch", "unbiased")
    draws = None if rule == "top" else torch.rand(n + 1, generator=draw.torch, dtype=torch.float64)
    if rule == "top" and weights == "unbiased":
        weights = "mean"
    if k > n:
        return
    a = {"score": score, "valid": valid, "draws": draws, "k": k, "rule": rule, "weights": weights}
    bounds.choose_rows(a, row_choice._choose_rows(*a.values()))


def percentile(draw):
    history = draw.tensor(draw.size(least=1), dtype=torch.float64)
    a = {"history": history, "loss": draw.tensor(draw.size(), dtype=torch.float64)}
    bounds.percentile(a, row_choice._percentile(*a.values()))


def cube_sample(draw):
    n, p = draw.size(), draw.size(most=9)
    size = draw.random.randint(0, n) if n else 0
    odds = torch.rand(n, generator=draw.torch, dtype=torch.float64) + 0.05
    probability = odds * size / odds.sum() if n else odds
    while (probability > 1).any():  # cut to 1 and spread what is over
        certain = probability >= 1
        rest = probability[~certain]
        probability = torch.where(certain, 1.0, probability * (size - certain.sum()) / rest.sum())
    chosen = ops.cube_sample(draw.tensor(n, p, special=0.0).double(), probability, draw.torch)
    assert int(chosen.sum()) == size, f"cube_sample: {int(chosen.sum())} units, not {size}"
    assert chosen[probability >= 1 - 1e-9].all()


OPERATORS = [
    cross_entropy_statistics,
    linear_cross_entropy_statistics,
    linear_cross_entropy,
    residual,
    gradient_gram,
    mean_gradient,
    matching_residual,
    match,
    nnls,
    sketch,
    choose_rows,
    percentile,
    cube_sample,
]
