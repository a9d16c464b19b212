"""Random inputs for every operator, and for each a bound of the error that its arithmetic admits.

``eps`` is the rounding unit of what an operator accumulates in. A sum of m products errs by at most (m + 2) eps times
the sum of their magnitudes, whatever its order; e^x by eps (|x| + 4), of which a term of size e^-x makes at most
5 eps of the sum. The bounds below add these up, and double the result for what is of second order.
"""

import itertools
import random

import torch

from selbp import ops, reference
from support.matching_invariants import check

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


def unit(dtype):
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def wide(x):
    return None if x is None else x.double()


def near(name, ours, exact, bound):
    """Each entry within its bound; an entry whose bound is not finite, or that no float32 holds, may be anything."""
    exact, bound = exact.double(), torch.as_tensor(bound, dtype=torch.float64).expand(exact.shape)
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    decided = torch.isfinite(bound) & torch.isfinite(exact) & (exact.abs() < 1e37)
    error = (ours.double() - exact).abs()
    tiny = 1e-300 if ours.dtype == torch.float64 else 1e-37  # below, float32 has no full precision
    bad = decided & ~(error <= 2 * bound + tiny)
    assert not bad.any(), (
        f"{name}: error {error[bad][0]:.3e} exceeds {2 * bound[bad][0] + tiny:.3e} in {bad.nonzero()[0]}"
    )


def soft_target(options, target, n_classes):
    y = torch.where((target >= 0) & (target < n_classes) & (target != options["ignore_index"]), target, 0)
    return reference.soft_target(y, n_classes, wide(options["class_weight"]), options["label_smoothing"], torch.float64)


def check_statistics(ours, logits, target, features, options, bias, eps, delta=None):
    """``delta`` (n,) is the error that the logits come with."""
    n_classes = logits.shape[1]
    z = logits.double()
    exact = reference.cross_entropy_statistics(
        z, target, wide(features), **{**options, "class_weight": wide(options["class_weight"])}, bias=bias
    )
    t = soft_target(options, target, n_classes)
    total, cap = t.sum(1), options["softcap"]
    delta = torch.zeros(len(z), dtype=torch.float64) if delta is None else delta
    shift = delta + 8 * eps * cap  # of each capped logit
    terms = 16 + n_classes / 4
    if options["label_smoothing"]:
        capped = reference.soft_cap(z, cap)
        spread = torch.where(t == 0, 0.0, t * (exact.lse[:, None] - capped)).sum(1).abs()
        spread = spread + total * (exact.lse.abs() + 1)
    else:
        spread = exact.loss.abs()
    valid = exact.valid & torch.isfinite(delta)
    for field in (exact.loss, exact.lse, exact.residual_sq, exact.feature_sq):
        valid &= field.abs() < 1e37
    norm = exact.residual_sq.clamp(min=0).sqrt()
    change = 2 * total * shift * (1 + (z.abs().amax(1) / cap if cap else 0))
    squares = exact.residual_sq + (total**2 + t.square().sum(1) if options["label_smoothing"] or cap else 0)
    held = torch.where(valid, 0.0, INF)
    near("loss", ours.loss, exact.loss, eps * terms * spread + 2 * total * shift + held)
    near("lse", ours.lse, exact.lse, eps * (terms + exact.lse.abs()) + shift + held)
    near(
        "residual_sq",
        ours.residual_sq,
        exact.residual_sq,
        4 * eps * terms * squares + 2 * norm * change + change**2 + held,
    )
    if features is not None:
        near("feature_sq", ours.feature_sq, exact.feature_sq, eps * (features.shape[1] + 4) * exact.feature_sq + held)
    assert ours.valid[valid].all(), "valid: a row that is"
    broken = (target == options["ignore_index"]) | torch.isnan(exact.loss)
    assert not ours.valid[broken].any(), "valid: a row that is not"
    assert (ours.loss[target == options["ignore_index"]] == 0).all(), "loss of an ignored row"
    y = torch.where((target >= 0) & (target < n_classes), target, 0)[:, None]
    capped = reference.soft_cap(z, cap)
    margin = capped.gather(1, y)[:, 0] - capped.scatter(1, y, -INF).amax(1)
    clear = valid & ((margin.abs() > 4 * shift) | ((delta == 0) & (cap == 0)))
    assert torch.equal(ours.correct[clear], exact.correct[clear]), "correct"
    return exact, valid


def cross_entropy_statistics(draw):
    n, n_classes, dtype = draw.size(), draw.size(least=1), draw.choice(*DTYPES)
    options, bias = draw.loss_options(n_classes, dtype), draw.choice(True, False)
    logits, target = draw.tensor(n, n_classes, dtype=dtype), draw.target(n, n_classes, options["ignore_index"])
    features = draw.choice(None, draw.tensor(n, draw.size(), dtype=dtype))
    ours = ops.cross_entropy_statistics(logits, target, features, **options, bias=bias)
    check_statistics(ours, logits, target, features, options, bias, unit(dtype))


def residual(draw):
    n, n_classes, dtype = draw.size(), draw.size(least=1), draw.choice(*DTYPES)
    options, eps = draw.loss_options(n_classes, dtype), unit(dtype)
    logits, target = draw.tensor(n, n_classes, dtype=dtype), draw.target(n, n_classes, options["ignore_index"])
    stats = ops.cross_entropy_statistics(logits, target, **options)
    ours = (
        ops.residual(logits, target, draw.layout(stats.lse), **options)
        if draw.choice(True, False)
        else ops.residual(logits, target, stats.lse, **options)
    )
    exact = reference.cross_entropy_statistics(
        logits.double(), target, **{**options, "class_weight": wide(options["class_weight"])}
    )
    r = reference.residual(
        logits.double(), target, exact.lse, **{**options, "class_weight": wide(options["class_weight"])}
    )
    total = soft_target(options, target, n_classes).sum(1)
    # The log-sum-exp was rounded, and in an expanded layout it is another row's: then nothing is known but the zeros.
    known = torch.isfinite(exact.lse) & (exact.lse.abs() < 1e30)
    assert (ours[target == options["ignore_index"]] == 0).all() and ours.shape == logits.shape
    assert torch.isfinite(ours[~torch.isfinite(exact.loss)]).all()
    if ours.numel() and known.any():
        cap = options["softcap"]
        near_lse = (ops.residual(logits, target, stats.lse, **options)).double()
        bound = eps * total * (24 + n_classes / 4 + 4 * exact.lse.abs() + 16 * cap * (1 + (cap > 0)))
        near("residual", near_lse, r, torch.where(known & exact.valid, bound, INF)[:, None])


def head(draw, n, dtype):
    d, n_classes = draw.size(), draw.size(least=1)
    features, weight = draw.tensor(n, d, dtype=dtype), draw.tensor(n_classes, d, dtype=dtype, special=0.05)
    return features, weight, draw.choice(None, draw.tensor(n_classes, dtype=dtype, special=0.05))


def logits_of(features, weight, bias):
    """The exact logits, and the error (n,) of those that a product in the operands' dtype has."""
    z = torch.nn.functional.linear(wide(features), wide(weight), wide(bias))
    size = torch.nn.functional.linear(
        wide(features).abs(), wide(weight).abs(), None if bias is None else wide(bias).abs()
    )
    eps = torch.finfo(features.dtype).eps
    finite = torch.where(torch.isfinite(size), size, INF)
    limit = torch.finfo(features.dtype).max
    tiny = (features.shape[1] + 1) * torch.finfo(features.dtype).smallest_normal  # what underflows
    delta = (unit(features.dtype) * (features.shape[1] + 4) * finite + 2 * eps * finite + tiny).amax(1)
    return z, torch.where(finite.amax(1) < limit / 4, delta, INF)


def linear_cross_entropy_statistics(draw):
    n, dtype = draw.size(), draw.choice(*DTYPES)
    features, weight, bias = head(draw, n, dtype)
    options = draw.loss_options(len(weight), dtype)
    target = draw.target(n, len(weight), options["ignore_index"])
    ours = ops.linear_cross_entropy_statistics(features, weight, bias, target, **options)
    z, delta = logits_of(features, weight, bias)
    check_statistics(ours, z, target, features, options, bias is not None, unit(dtype), delta)


def linear_cross_entropy(draw):
    n, dtype = draw.size(), draw.choice(*DTYPES)
    features, weight, bias = head(draw, n, dtype)
    options = draw.loss_options(len(weight), dtype)
    target = draw.target(n, len(weight), options["ignore_index"])
    rows = draw.choice(None, torch.randint(0, n, (draw.size(),), generator=draw.torch) if n else None)
    inputs = [x if x is None else x.detach().requires_grad_() for x in (features, weight, bias)]
    loss, ours = ops.linear_cross_entropy(*inputs, target, **options, rows=rows, return_statistics=True)
    assert torch.equal(loss.detach().nan_to_num(7.0), ours.loss.nan_to_num(7.0)), "loss and statistics differ"
    z, delta = logits_of(features, weight, bias)
    exact, valid = check_statistics(ours, z, target, features, options, bias is not None, unit(dtype), delta)
    upstream = torch.randn(n, generator=draw.torch).to(loss.dtype) * (torch.rand(n, generator=draw.torch) < 0.7)
    found = torch.autograd.grad(loss, [x for x in inputs if x is not None], upstream)
    if not torch.isfinite(wide(weight)).all() or (exact.valid & ~valid).any() or not torch.equal(valid, ours.valid):
        return  # a weight that is not finite spoils the products; a row at the edge of the type decides by rounding
    live = ours.valid if rows is None else ours.valid & torch.zeros(n, dtype=torch.bool).index_fill(0, rows, True)
    r = reference.residual(z, target, exact.lse, **{**options, "class_weight": wide(options["class_weight"])})
    scale = torch.where(live, upstream.double(), 0.0)[:, None]
    r, h = torch.where(live[:, None], r, 0.0) * scale, torch.where(live[:, None], wide(features), 0.0)
    t, eps, cap = soft_target(options, target, len(weight)), torch.finfo(dtype).eps, options["softcap"]
    shift = torch.where(live, delta + 8 * unit(dtype) * cap + unit(dtype) * (24 + len(weight) + exact.lse.abs()), 0.0)
    slope = (1 + torch.where(live, z.abs().amax(1), 0.0) / cap) if cap else 1.0
    wrong = ((4 * t.sum(1) * shift * slope)[:, None] + eps * t.sum(1)[:, None]) * scale.abs() + 2 * eps * r.abs()
    w, terms = wide(weight), (len(weight) + 8) * unit(dtype) + 4 * eps
    bounds = [
        wrong @ w.abs() + terms * (r.abs() @ w.abs()),
        wrong.t() @ h.abs() + (n + 8) * eps * (r.abs().t() @ h.abs()),
    ]
    exacts = [r @ w, r.t() @ h, r.sum(0)]
    bounds.append(wrong.sum(0) + (n + 8) * eps * r.abs().sum(0))
    limit = torch.finfo(dtype).max / 4
    for name, a, x, bound in zip(("features", "weight", "bias"), found, exacts, bounds, strict=False):
        tiny = torch.finfo(dtype).smallest_normal * (1 + h.abs().sum())
        near(f"gradient of {name}", a, x, torch.where(x.abs() + bound < limit, bound + tiny, INF))


def factors(draw):
    n, dtype = draw.size(), draw.choice(*DTYPES)
    r, h = draw.tensor(n, draw.size(), dtype=dtype), draw.tensor(n, draw.size(), dtype=dtype)
    finite = (torch.isfinite(r).all(1) & torch.isfinite(h).all(1))[:, None]
    return r, h, torch.where(finite, r.double(), 0.0), torch.where(finite, h.double(), 0.0), draw.choice(True, False)


def gradient_gram(draw):
    r, h, rd, hd, bias = factors(draw)
    ours = ops.gradient_gram(r, h, bias=bias)
    size = (rd.abs() @ rd.abs().T) * (hd.abs() @ hd.abs().T + bias)
    inner = torch.maximum(rd.abs() @ rd.abs().T, hd.abs() @ hd.abs().T)  # what overflows before the product may not
    bound = unit(r.dtype) * (r.shape[1] + h.shape[1] + 8) * size
    near(
        "gram",
        ours,
        (rd @ rd.T) * (hd @ hd.T + bias),
        torch.where((inner < 1e37) & (size < 1e37), bound + 1e-35 * inner, INF),
    )
    assert torch.equal(ours.nan_to_num(3.0), ours.T.nan_to_num(3.0)), "gram: not symmetric"


def mean_gradient(draw):
    r, h, rd, hd, bias = factors(draw)
    ours, n = ops.mean_gradient(r, h, bias=bias), max(len(r), 1)
    exact = reference.mean_gradient(rd, hd, bias=bias)
    size, eps = rd.abs().T @ hd.abs() / n, unit(r.dtype)
    if size.numel() and size.max() > 1e17 or (rd.numel() and rd.abs().max() > 1e17):
        return  # the squares or the products leave float32
    near("head_weight", ours.head_weight, exact.head_weight, eps * (n + 4) * size)
    mass = ((rd.abs() @ size) * hd.abs()).sum(1)
    square = (size**2).sum()
    if bias:
        column = rd.abs().sum(0) / n
        near("head_bias", ours.head_bias, exact.head_bias, eps * (n + 4) * column)
        mass, square = mass + rd.abs() @ column, square + (column**2).sum()
    near(
        "inner",
        ours.inner,
        exact.inner,
        eps * (n + r.shape[1] + h.shape[1] + 12) * mass + 1e-36 * (1 + hd.abs().sum(1)),
    )
    near("target_sq", ours.target_sq, exact.target_sq, 2 * eps * (n + 8) * square)


def matching_residual(draw):
    r, h, rd, hd, bias = factors(draw)
    n, k = len(r), draw.size()
    indices = torch.randint(-1, n, (k,), generator=draw.torch) if n else torch.full((k,), -1)
    weights = draw.tensor(k, special=0.0)
    ours = ops.matching_residual(r, h, ops.Selection(draw.layout(indices) if k < 2 else indices, weights), bias=bias)
    exact = reference.matching_residual(rd, hd, indices, weights, bias=bias)
    hb = torch.cat([hd, hd.new_ones(n, 1)], 1) if bias else hd
    g = rd.norm(dim=1) * hb.norm(dim=1)
    w = torch.where(indices >= 0, weights.double(), 0.0).abs()
    mass = g.sum() / max(n, 1) + (w * g[indices.clamp(min=0)]).sum() if n else g.sum()
    mean = (rd.T @ hb / max(n, 1)).norm()
    if mean > 0 and mass < 1e100:
        near("matching_residual", ours, exact, 1e-15 * (n + k + 16) * mass / mean * (1 + exact))


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
    found = ops.match(
        draw.layout(gram) if not batch else gram, inner, target_sq, k, rule=draw.choice("ols", "normalized", "raw"),
        ridge=draw.choice(0.0, 1e-6, 1e-3, 0.1), nonnegative=nonnegative, valid=valid,
        tolerance=draw.choice(0.0, 0.0, 0.3),
    )  # fmt: skip
    for one in itertools.product(*(range(size) for size in batch)):
        check(ops.Matching(*(x[one] for x in found)), inner[one], k, n, nonnegative, valid)


def nnls(draw):
    m, n, dtype = draw.size(most=33), draw.size(most=17), draw.choice(*DTYPES)
    a = torch.randn(m, n, generator=draw.torch, dtype=torch.float64).to(dtype)
    b = draw.tensor(m, dtype=dtype, special=0.0)
    if m and n:
        a = draw.layout(a)
    x = ops.nnls(a, b)
    assert x.shape == (n,) and (x >= 0).all()
    a, b, x = a.double(), b.double(), x.double()
    slope = a.T @ (b - a @ x)
    size = a.abs().T @ (b.abs() + a.abs() @ x)  # what the slope cancels from
    slack = (1e-6 if dtype != torch.float64 else 1e-8) * size + 1e-7 * a.norm(dim=0) * b.norm()
    assert (slope <= slack).all(), f"nnls: slope {slope.max():.2e} of a row left out"
    assert (slope.abs()[x > 0] <= slack[x > 0]).all(), "nnls: slope of a row in use"


def sketch(draw):
    n, length, dtype = draw.size(most=9), draw.size(most=9), draw.choice(torch.float32, torch.float64)
    flat, weight, bias = head(draw, n * length, dtype)
    options = draw.loss_options(len(weight), dtype)
    y = draw.target(n * length, len(weight), options["ignore_index"])
    d = flat.shape[1]
    left, right = ops.sketch_projections(len(weight), d + (bias is not None), (3, 5), seed=1, dtype=dtype)
    features, target = flat.reshape(n, length, d), y.reshape(n, length)
    ours = ops.sketch(features, weight, bias, target, (left, right), **options)
    assert ours.shape == (n, 3, 5)
    z, delta = logits_of(flat, weight, bias)
    stats = ops.linear_cross_entropy_statistics(flat, weight, bias, y, **options)
    narrow = {**options, "class_weight": wide(options["class_weight"])}
    exact = reference.cross_entropy_statistics(z, y, wide(flat), **narrow)
    same = torch.equal(exact.valid, stats.valid) and torch.isfinite(delta[stats.valid]).all()
    if not same or not torch.isfinite(wide(weight)).all():
        return
    spec = reference.sketch(
        features.double(), wide(weight), wide(bias), target, left.double(), right.double(), **narrow
    )
    cap, eps, live = options["softcap"], unit(dtype), stats.valid
    slope = (1 + z.abs().amax(1) / cap) if cap else 1.0
    t = soft_target(options, y, len(weight)).sum(1)
    shift = 4 * t * slope * (delta + 8 * eps * cap + eps * (24 + len(weight) + exact.lse.abs()))
    hb = torch.cat([wide(flat), z.new_ones(len(z), 1)], 1) if bias is not None else wide(flat)
    mass = torch.where(live, (shift + eps * (16 + d) * t * 2) * len(weight) * hb.abs().sum(1), 0.0)
    near("sketch", ours, spec, mass.view(n, length).sum(1)[:, None, None].expand(spec.shape))


def choose_rows(draw):
    from selbp.ops.choose_rows import _choose_rows
    from selbp.reference.sampling import choose_rows as specified

    n = draw.size(least=1)
    score = draw.tensor(n, dtype=torch.float64)
    valid, k = torch.rand(n, generator=draw.torch) < draw.choice(0.0, 0.5, 1.0), draw.choice(1, 2, n, max(1, n // 2))
    rule, weights = draw.choice("top", "odds", "rank"), draw.choice("mean", "batch", "unbiased")
    draws = None if rule == "top" else torch.rand(n + 1, generator=draw.torch, dtype=torch.float64)
    if rule == "top" and weights == "unbiased":
        weights = "mean"
    if k > n:
        return
    indices, found = _choose_rows(score, valid, draws, k, rule, weights)
    expected, exact = specified(score, valid, draws, k, rule, weights)
    assert torch.equal(indices, expected), f"choose_rows: {indices.tolist()}, not {expected.tolist()}"
    near("weights", found, exact, 1e-12 * exact.abs())


def percentile(draw):
    from selbp.ops.choose_rows import _percentile
    from selbp.reference.sampling import percentile as specified_percentile

    history = draw.tensor(draw.size(least=1), dtype=torch.float64)
    loss = draw.tensor(draw.size(), dtype=torch.float64)
    for a, x in zip(_percentile(history, loss), specified_percentile(history, loss), strict=True):
        assert torch.equal(a.nan_to_num(7.0), x.nan_to_num(7.0)), "percentile"


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
    cross_entropy_statistics, linear_cross_entropy_statistics, linear_cross_entropy, residual, gradient_gram,
    mean_gradient, matching_residual, match, nnls, sketch, choose_rows, percentile, cube_sample,
]  # fmt: skip
