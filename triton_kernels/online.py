"""The sums over the classes other than the target that statistics are made of, kept while the classes go by.

For row i with target y, over c != y (the reference c of arithmetic.py, here called ref, is an integer):

    m   = max z_c          s = sum e_c          s2 = sum (g_c e_c)^2          e_c = 2^(z_c log2 e - ref)

g_c = 1 - tanh^2 is the slope of the soft cap (1 without one). combine.py joins these with z_y into

    loss = log(1 + e^(m' - z_y) s)      ||r||^2 = (p_rest g_y)^2 + sum_c (g_c p_c)^2    p_rest = sum_{c != y} p_c

so that nothing cancels where p_y is close to 1. Label smoothing gives every class a share a_c = (eps / C) w_c of the
target, and sum_c g_c^2 (T p_c - a_c)^2 must not be expanded: a trained model has T p_c close to a_c. It is a least-
squares fit of e by w instead, kept as Welford and Chan do: with E = g e, V = g w over the classes seen so far

    amount = sum w     spread = sum w (ref - z log2 e)     rho = E.V / V.V     square = V.V     s2 = ||E - rho V||^2

and ||x E - k V||^2 = x^2 s2 + (x rho - k)^2 square for every x, k. Without smoothing V is 0, and s2 the sum of squares
above. Two parts merge with delta = rho' - rho: s2 + s2' + delta^2 square square' / (square + square'). C++ keeps the
same sums under the same names, relative to m and in natural logarithms.
"""

import triton
import triton.language as tl

from .arithmetic import FLOOR, LOG2E, MINUS_INFINITY, reference_exponent
from .matmul_tile import capped_logits

FIELDS = {False: 3, True: 7}  # of the partials: m, s, s2; smoothed m, s, s2, amount, spread, rho, square


@triton.jit
def empty_state(ROWS: tl.constexpr, SMOOTH: tl.constexpr):
    """Return m, ref and the sums, in the order of FIELDS, of rows that have seen no class."""
    zero = tl.zeros((ROWS,), tl.float32)
    state = tl.full((ROWS,), MINUS_INFINITY, tl.float32), tl.full((ROWS,), FLOOR, tl.float32) * LOG2E, zero, zero
    if SMOOTH:
        state = state + (zero, zero, zero, zero)
    return state


@triton.jit
def moved(z, state):
    """Return the state's m and ref after the tile z, the sums' change of scale, and the tile's log2 e and e."""
    m = tl.maximum(state[0], tl.max(z, 1))
    new = reference_exponent(m)
    exponent = tl.fma(z, LOG2E, -new[:, None])
    return m, new, tl.exp2(state[1] - new), exponent, tl.exp2(exponent)


@triton.jit
def absorb(z, g, w, state, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr):
    """The state after the tile z (excluded entries -inf), then its g e, g w, the sums' change of scale, and its sum e.

    g is the cap's slope; w holds the class weights, 0 where a class is excluded, and is read with smoothing only.
    """
    ref, s = state[1], state[2]
    m, new, scale, exponent, e = moved(z, state)
    total = tl.sum(e, 1)
    s = s * scale + total
    if SMOOTH:
        spread = state[5] + state[4] * (new - ref) + tl.sum(tl.where(w == 0.0, 0.0, -w * exponent), 1)
        amount = state[4] + tl.sum(w, 1)
    if SOFTCAP:
        e = e * g
        w = w * g
    if SMOOTH:
        square = tl.sum(w * w, 1)
        rho = tl.sum(e * w, 1) / tl.where(square > 0.0, square, 1.0)
        left = e - rho[:, None] * w
        rho, s2, square = merge_fit(
            state[6] * scale, state[3] * (scale * scale), state[7], rho, tl.sum(left * left, 1), square
        )
        state = m, new, s, s2, amount, spread, rho, square
    else:
        state = m, new, s, state[3] * (scale * scale) + tl.sum(e * e, 1)
    return state, e, w, scale, total


@triton.jit
def absorb_unweighted(z, excluded, amount, state):
    """``absorb`` with label smoothing alone, where all w and g are 1: of the classes ``amount`` are not excluded."""
    ref = state[1]
    m, new, scale, exponent, e = moved(z, state)
    total = tl.sum(e, 1)
    spread = state[5] + state[4] * (new - ref) - tl.sum(tl.where(excluded, 0.0, exponent), 1)
    rho = total / tl.maximum(amount, 1.0)
    left = tl.where(excluded, 0.0, e - rho[:, None])
    rho, s2, square = merge_fit(
        state[6] * scale, state[3] * (scale * scale), state[4], rho, tl.sum(left * left, 1), amount
    )
    return m, new, state[2] * scale + total, s2, square, spread, rho, square


@triton.jit
def merge_fit(rho, s2, square, rho_, s2_, square_):
    """Least-squares fits of two disjoint sets of classes, joined: (rho, s2, square)."""
    total = square + square_
    share = tl.where(total > 0.0, square_ / tl.where(total > 0.0, total, 1.0), 0.0)
    delta = rho_ - rho
    return rho + delta * share, s2 + s2_ + delta * delta * (square * share), total


@triton.jit
def class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT: tl.constexpr):
    """The weights of a tile's classes, 0 where a row excludes them."""
    if HAS_WEIGHT:
        w = tl.load(class_weight + columns, mask=columns < n_classes, other=0.0).to(tl.float32)[None, :]
    else:
        w = 1.0
    return tl.where(excluded, 0.0, w)


@triton.jit
def absorb_products(
    z,
    bias,
    class_weight,
    y,
    first,
    n_classes,
    softcap,
    state,
    EVEN_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SLICED: tl.constexpr,
):
    """Return what ``absorb`` gives for the products z of features and the classes from ``first`` on.

    SLICED, the tile's e and w are of no use, and the sums of smoothing alone take fewer registers.
    """
    offset = tl.arange(0, z.shape[1])
    columns = first + offset
    z, g = capped_logits(z, bias, columns, n_classes, softcap, EVEN_COLUMNS, HAS_BIAS, SOFTCAP)
    excluded = offset[None, :] == (y - first)[:, None]
    if not EVEN_COLUMNS:
        excluded = excluded | (offset >= n_classes - first)[None, :]
    z = tl.where(excluded, MINUS_INFINITY, z)
    if SLICED and SMOOTH and not SOFTCAP and not HAS_WEIGHT:
        own = (y >= first) & (y < first + z.shape[1])
        amount = (tl.minimum(n_classes - first, z.shape[1]) - own.to(tl.int32)).to(tl.float32)
        return absorb_unweighted(z, excluded, amount, state), z, z, amount, amount  # four that are not read
    else:
        w = z
        if SMOOTH:
            w = class_weights(class_weight, columns, n_classes, excluded, HAS_WEIGHT)
        return absorb(z, g, w, state, SOFTCAP, SMOOTH)
