"""What each operator must return: the reference in float64, within a bound of the error that its arithmetic admits.

``eps`` is the rounding unit of what an operator accumulates in. A sum of m products errs by at most (m + 2) eps times
the sum of their magnitudes, whatever its order; e^x by eps (|x| + 4), of which a term of size e^-x makes at most
5 eps of the sum. The bounds below add these up, and double the result for what is of second order.

Each function is handed the operator's arguments by name, as in its schema, and what it returned.
"""

import itertools

import torch

from selbp import ops, reference
from support.matching_invariants import check as check_matching

INF = float("inf")
OPTIONS = ("class_weight", "ignore_index", "label_smoothing", "softcap")


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


def output_dtype(name, ours, inputs):
    """What an operator returns is in float64 for float64 inputs, else in float32."""
    wanted = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    assert ours.dtype == wanted, f"{name}: {ours.dtype}, not {wanted}"


# ------------------------------------------------------------------------------------------------------- losses


def options_of(a):
    return {name: a[name] for name in OPTIONS}


def exactly(options):
    return {**options, "class_weight": wide(options["class_weight"])}


def soft_target(options, target, n_classes):
    y = torch.where((target >= 0) & (target < n_classes) & (target != options["ignore_index"]), target, 0)
    return reference.soft_target(y, n_classes, wide(options["class_weight"]), options["label_smoothing"], torch.float64)


def statistics(ours, logits, target, features, options, bias, eps, delta=None):
    """``delta`` (n,) is the error that the logits come with. Returns the exact ones and which rows they decide."""
    n_classes = logits.shape[1]
    z = logits.double()
    exact = reference.cross_entropy_statistics(z, target, wide(features), **exactly(options), bias=bias)
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
    change = change + 2 * total * unit(torch.float64) * exact.lse.abs()  # what exp(z - lse) rounds in the exact ones
    squares = exact.residual_sq + (total**2 + t.square().sum(1) if options["label_smoothing"] or cap else 0)
    square = 4 * eps * terms * squares + 2 * norm * change + change**2
    held = torch.where(valid, 0.0, INF)
    near("loss", ours.loss, exact.loss, eps * terms * spread + 2 * total * shift + held)
    near("lse", ours.lse, exact.lse, eps * (terms + exact.lse.abs()) + shift + held)
    near("residual_sq", ours.residual_sq, exact.residual_sq, square + held)
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


def cross_entropy_statistics(a, ours):
    for field in ours[:4]:
        output_dtype("statistics", field, a["logits"])
    return statistics(ours, a["logits"], a["target"], a["features"], options_of(a), a["bias"], unit(a["logits"].dtype))


def logits_of(features, weight, bias):
    """The exact logits, and the error (n,) of those that a product in the operands' dtype has."""
    z = torch.nn.functional.linear(wide(features), wide(weight), wide(bias))
    magnitude = None if bias is None else wide(bias).abs()
    size = torch.nn.functional.linear(wide(features).abs(), wide(weight).abs(), magnitude)
    eps = torch.finfo(features.dtype).eps
    finite = torch.where(torch.isfinite(size), size, INF)
    limit = torch.finfo(features.dtype).max
    tiny = (features.shape[1] + 1) * torch.finfo(features.dtype).smallest_normal  # what underflows
    delta = (unit(features.dtype) * (features.shape[1] + 4) * finite + 2 * eps * finite + tiny).amax(1)
    return z, torch.where(finite.amax(1) < limit / 4, delta, INF)


def linear_cross_entropy_statistics(a, ours):
    features, bias = a["features"], a["bias"]
    z, delta = logits_of(features, a["weight"], bias)
    for field in ours[:4]:
        output_dtype("statistics", field, features)
    return statistics(ours, z, a["target"], features, options_of(a), bias is not None, unit(features.dtype), delta)


def linear_cross_entropy(a, ours):
    loss, found = ours
    assert torch.equal(loss.detach().nan_to_num(7.0), found.loss.nan_to_num(7.0)), "loss and statistics differ"
    return linear_cross_entropy_statistics(a, found)


def linear_cross_entropy_gradients(a, valid, exact, upstream, found):
    """``found`` holds the gradients of features, weight and bias; ``exact`` and ``valid`` come from the forward."""
    features, weight, target, rows, options = a["features"], a["weight"], a["target"], a["rows"], options_of(a)
    n, dtype = len(features), features.dtype
    z, delta = logits_of(features, weight, a["bias"])
    live = valid if rows is None else valid & torch.zeros(n, dtype=torch.bool).index_fill(0, rows, True)
    r = reference.residual(z, target, exact.lse, **exactly(options))
    scale = torch.where(live, upstream.double(), 0.0)[:, None]
    r, h = torch.where(live[:, None], r, 0.0) * scale, torch.where(live[:, None], wide(features), 0.0)
    t, eps, cap = soft_target(options, target, len(weight)), torch.finfo(dtype).eps, options["softcap"]
    shift = torch.where(live, delta + 8 * unit(dtype) * cap + unit(dtype) * (24 + len(weight) + exact.lse.abs()), 0.0)
    slope = (1 + torch.where(live, z.abs().amax(1), 0.0) / cap) if cap else 1.0
    wrong = ((4 * t.sum(1) * shift * slope)[:, None] + eps * t.sum(1)[:, None]) * scale.abs() + 2 * eps * r.abs()
    w, terms = wide(weight), (len(weight) + 8) * unit(dtype) + 4 * eps
    # What skip_mass lets each row of the logits' gradient be off by, in sum of absolute values.
    skipped = 0.0 if options["label_smoothing"] else a.get("skip_mass", 0.0)
    capped, y = reference.soft_cap(z, cap), torch.where((target >= 0) & (target < len(weight)), target, 0)[:, None]
    p_rest = torch.where(live, torch.exp(capped.scatter(1, y, -INF).logsumexp(1) - exact.lse), 0.0)[:, None]
    skipped = 2 * skipped * t.sum(1, keepdim=True) * (p_rest * (1 + 4 * shift[:, None])) * scale.abs()
    bounds = [
        wrong @ w.abs() + terms * (r.abs() @ w.abs()) + skipped * w.abs().amax(0),
        wrong.t() @ h.abs() + (n + 8) * eps * (r.abs().t() @ h.abs()) + (skipped * h.abs()).sum(0),
        wrong.sum(0) + (n + 8) * eps * r.abs().sum(0) + skipped.sum(0),
    ]
    limit = torch.finfo(dtype).max / 4
    names, exacts = ("features", "weight", "bias"), (r @ w, r.t() @ h, r.sum(0))
    for name, ours, x, bound in zip(names, found, exacts, bounds, strict=False):
        tiny = torch.finfo(dtype).smallest_normal * (1 + h.abs().sum())
        assert ours.dtype == dtype, name
        near(f"gradient of {name}", ours, x, torch.where(x.abs() + bound < limit, bound + tiny, INF))


def residual(a, ours):
    """``lse`` must be that of these logits, rounded."""
    logits, target, options = a["logits"], a["target"], options_of(a)
    exact = reference.cross_entropy_statistics(logits.double(), target, **exactly(options))
    output_dtype("residual", ours, logits)
    assert (ours[target == options["ignore_index"]] == 0).all() and ours.shape == logits.shape
    assert torch.isfinite(ours[~torch.isfinite(exact.loss)]).all()
    known = torch.isfinite(exact.lse) & (exact.lse.abs() < 1e30)
    if not (ours.numel() and known.any()):
        return
    total, cap, eps = soft_target(options, target, logits.shape[1]).sum(1), options["softcap"], unit(logits.dtype)
    bound = eps * total * (24 + logits.shape[1] / 4 + 4 * exact.lse.abs() + 16 * cap * (1 + (cap > 0)))
    r = reference.residual(logits.double(), target, exact.lse, **exactly(options))
    near("residual", ours, r, torch.where(known & exact.valid, bound, INF)[:, None])


def sketch(a, ours):
    features, weight, bias, target = (a[name] for name in ("features", "weight", "bias", "target"))
    left, right, options = a["left"], a["right"], options_of(a)
    (n, length, d), y = features.shape, target.reshape(-1)
    flat = features.reshape(n * length, d)
    assert ours.shape == (n, left.shape[1], right.shape[1])
    output_dtype("sketch", ours, features)
    z, delta = logits_of(flat, weight, bias)
    stats = ops.linear_cross_entropy_statistics(flat, weight, bias, y, **options)
    exact = reference.cross_entropy_statistics(z, y, wide(flat), **exactly(options))
    same = torch.equal(exact.valid, stats.valid) and torch.isfinite(delta[stats.valid]).all()
    if not same or not torch.isfinite(wide(weight)).all():
        return  # a weight that is not finite spoils the products; a row at the edge of the type decides by rounding
    spec = reference.sketch(
        features.double(), wide(weight), wide(bias), target, left.double(), right.double(), **exactly(options)
    )
    cap, eps, live = options["softcap"], unit(features.dtype), stats.valid
    slope = (1 + z.abs().amax(1) / cap) if cap else 1.0
    t = soft_target(options, y, len(weight)).sum(1)
    shift = 4 * t * slope * (delta + 8 * eps * cap + eps * (24 + len(weight) / 4 + 4 * exact.lse.abs()))
    hb = torch.cat([wide(flat), z.new_ones(len(z), 1)], 1) if bias is not None else wide(flat)
    # The classes' probabilities sum to 1, so the shifts of all classes' residuals together are no more than `shift`.
    error = shift + 2 * t * eps * (len(weight) + d + length + 16)
    largest = float(left.abs().amax() * right.abs().amax()) if left.numel() and right.numel() else 0.0
    mass = torch.where(live, error * hb.abs().sum(1) * largest, 0.0)
    near("sketch", ours, spec, mass.view(n, length).sum(1)[:, None, None].expand(spec.shape))


def sketch_gram(a, ours):
    flat = a["sketches"].double().flatten(1)
    output_dtype("sketch_gram", ours, a["sketches"])
    size = flat.abs() @ flat.abs().T
    near("sketch_gram", ours, flat @ flat.T, unit(a["sketches"].dtype) * (flat.shape[1] + 2) * size)


# ------------------------------------------------------------------------------------------------------ factors


def finite_factors(a):
    """The factors in float64, rows that are not finite as zero, and the features with the bias's column."""
    r, h = a["residual"], a["features"]
    finite = (torch.isfinite(r).all(1) & torch.isfinite(h).all(1))[:, None]
    rd, hd = torch.where(finite, r.double(), 0.0), torch.where(finite, h.double(), 0.0)
    return rd, hd, torch.cat([hd, hd.new_ones(len(hd), 1)], 1) if a["bias"] else hd


def gradient_gram(a, ours):
    rd, hd, _ = finite_factors(a)
    bias, dtype = a["bias"], a["residual"].dtype
    output_dtype("gram", ours, a["residual"])
    rr, hh = rd.abs() @ rd.abs().T, hd.abs() @ hd.abs().T
    size, inner = rr * (hh + bias), torch.maximum(rr, hh)  # what overflows before the product may not
    bound = unit(dtype) * (rd.shape[1] + hd.shape[1] + 8) * size + 1e-35 * inner
    if dtype == torch.bfloat16:  # AVX512-BF16 takes a subnormal input, below 1.2e-38, for 0
        lost_r, lost_h = (1.2e-38 * (x.abs().sum(1)[:, None] + x.abs().sum(1)) for x in (rd, hd))
        bound += lost_r * (hh + bias) + lost_h * rr
    decided = (inner < 1e37) & (size < 1e37)
    near("gram", ours, (rd @ rd.T) * (hd @ hd.T + bias), torch.where(decided, bound, INF))
    assert torch.equal(ours.nan_to_num(3.0), ours.T.nan_to_num(3.0)), "gram: not symmetric"


def mean_gradient(a, ours):
    rd, hd, _ = finite_factors(a)
    bias, n, eps = a["bias"], max(len(rd), 1), unit(a["residual"].dtype)
    for field in ours[:3]:
        output_dtype("mean_gradient", field, a["residual"])
    exact = reference.mean_gradient(rd, hd, bias=bias)
    size = rd.abs().T @ hd.abs() / n
    if size.numel() and size.max() > 1e17 or (rd.numel() and rd.abs().max() > 1e17):
        return  # the squares or the products leave float32
    near("head_weight", ours.head_weight, exact.head_weight, eps * (n + 4) * size)
    mass, means, sizes = ((rd.abs() @ size) * hd.abs()).sum(1), [exact.head_weight], [size]
    assert (ours.head_bias is None) == (not bias)
    if bias:
        column = rd.abs().sum(0) / n
        near("head_bias", ours.head_bias, exact.head_bias, eps * (n + 4) * column)
        mass = mass + rd.abs() @ column
        means.append(exact.head_bias), sizes.append(column)
    steps = n + rd.shape[1] + hd.shape[1] + bias + 12
    near("inner", ours.inner, exact.inner, eps * steps * mass + 1e-36 * (1 + hd.abs().sum(1)))
    mean, error = torch.cat([x.flatten() for x in means]), eps * (n + 4) * torch.cat([x.flatten() for x in sizes])
    square = (2 * mean.abs() * error + error**2).sum() + eps * (len(mean) + 2) * exact.target_sq
    near("target_sq", ours.target_sq, exact.target_sq, square)


def matching_residual(a, ours):
    rd, hd, hb = finite_factors(a)
    n, k, indices = len(rd), len(a["indices"]), a["indices"]
    exact = reference.matching_residual(rd, hd, indices, a["weights"], bias=a["bias"])
    assert ours.dtype == torch.float64 and ours.shape == ()
    g = rd.norm(dim=1) * hb.norm(dim=1)
    w = torch.where(indices >= 0, a["weights"].double(), 0.0).abs()
    mass = g.sum() / max(n, 1) + (w * g[indices.clamp(min=0)]).sum() if n else g.sum()
    mean = (rd.T @ hb / max(n, 1)).norm()
    if mean > 0 and mass < 1e100:
        near("matching_residual", ours, exact, 1e-15 * (n + k + 16) * mass / mean * (1 + exact))


# ----------------------------------------------------------------------------------------------------- matching


def match(a, ours):
    """Feasible, honest about its residual, and as good as the reference: near-ties may be broken otherwise."""
    inner, k = a["inner"], a["k"]
    for field in (ours.weights, ours.residual):
        output_dtype("match", field, a["gram"])
    for one in itertools.product(*(range(size) for size in inner.shape[:-1])):
        check_matching(
            ops.Matching(*(x[one] for x in ours)), inner[one], k, inner.shape[-1], a["nonnegative"], a["valid"]
        )


def optimal(x, slope, size, scale, dtype):
    """The conditions of Karush, Kuhn and Tucker: no slope that descends, and none at all in a row that is in use.

    ``size`` is what the slope cancels from, ``scale`` what a row's slope is small against.
    """
    slack = (1e-6 if dtype != torch.float64 else 1e-8) * size + 1e-7 * scale
    assert (slope <= slack).all(), f"nnls: slope {slope.max():.2e} of a row left out"
    assert (slope.abs()[x > 0] <= slack[x > 0]).all(), "nnls: slope of a row in use"


def times(matrix, vector):
    return (matrix @ vector[..., None])[..., 0]


def nnls(a, ours):
    m, b, x = a["a"].double(), a["b"].double(), ours.double()
    output_dtype("nnls", ours, a["a"])
    assert ours.shape == m.shape[:-2] + m.shape[-1:] and (ours >= 0).all()
    slope = times(m.mT, b - times(m, x)) - a["ridge"] * m.square().sum(-2).mean(-1, keepdim=True) * x
    size = times(m.abs().mT, b.abs() + times(m.abs(), x)) * (1 + a["ridge"])
    optimal(x, slope, size, m.norm(dim=-2) * b.norm(dim=-1, keepdim=True), a["a"].dtype)


def nnls_gram(a, ours):
    gram, inner, x = a["gram"].double(), a["inner"].double(), ours.double()
    output_dtype("nnls_gram", ours, a["gram"])
    assert ours.shape == inner.shape and (ours >= 0).all()
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    slope = inner - times(gram, x) - a["ridge"] * diagonal.mean(-1, keepdim=True) * x
    if a["valid"] is not None:
        assert (ours[~a["valid"]] == 0).all(), "nnls_gram: a row that may not be chosen"
        slope = torch.where(a["valid"], slope, 0.0)
    size = (inner.abs() + times(gram.abs(), x)) * (1 + a["ridge"])
    # b.b is at least inner^2 / diagonal of each row.
    least = (inner / diagonal.clamp(min=1e-300).sqrt()).abs()
    longest = least.amax(-1, keepdim=True) if least.shape[-1] else least
    optimal(x, slope, size, diagonal.sqrt() * longest, a["gram"].dtype)


# ----------------------------------------------------------------------------------------------------- drawing


def cube_sample(a, ours):
    assert torch.equal(ours, reference.cube_sample(*a.values())), "cube_sample"


def choose_rows(a, ours):
    specified = {name: value for name, value in a.items() if name != "single"}  # which is of the weights' dtype
    indices, weights = reference.choose_rows(**specified)
    assert torch.equal(ours[0], indices), f"choose_rows: {ours[0].tolist()}, not {indices.tolist()}"
    near("weights", ours[1], weights, 1e-12 * weights.abs())


def percentile(a, ours):
    for found, exact in zip(ours, reference.percentile(*a.values()), strict=True):
        assert torch.equal(found.nan_to_num(7.0), exact.nan_to_num(7.0)), "percentile"
