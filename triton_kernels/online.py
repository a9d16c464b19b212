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

FIELDS = {False: 3, True: 7}  # of the partials: m, s, s2; smoothed m, s, s2, amount, spread, rho, square


@triton.jit
def empty_state(ROWS: tl.constexpr, SMOOTH: tl.constexpr):
    """Of rows of which no class has been seen: m, ref, and the sums in the order of FIELDS."""
    zero = tl.zeros((ROWS,), tl.float32)
    state = tl.full((ROWS,), MINUS_INFINITY, tl.float32), tl.full((ROWS,), FLOOR, tl.float32) * LOG2E, zero, zero
    if SMOOTH:
        state = state + (zero, zero, zero, zero)
    return state


@triton.jit
def absorb(
    z,
    g,
    y,
    first,
    n_classes,
    class_weight,
    state,
    EVEN_COLUMNS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """The state after the logits z of the classes from ``first`` on, then g e, w and the sums' change of scale.

    g is the cap's slope. The target y and classes beyond the last are in no sum. w, the class weights with 0 for those,
    is read with smoothing only.
    """
    columns = first + tl.arange(0, z.shape[1])
    # Of the numbers compared, one is a constant of the program and one a row's: neither takes registers for the tile.
    excluded = ((y - first)[:, None] ^ tl.arange(0, z.shape[1])[None, :]) == 0
    if not EVEN_COLUMNS:
        excluded = excluded | (columns >= n_classes)[None, :]
    z = tl.where(excluded, MINUS_INFINITY, z)
    ref = state[1]
    m = tl.maximum(state[0], tl.max(z, 1))
    new = reference_exponent(m)
    scale = tl.exp2(ref - new)
    exponent = tl.fma(z, LOG2E, -new[:, None])
    e = tl.exp2(exponent)
    total = tl.sum(e, 1)
    s = state[2] * scale + total
    if SOFTCAP:
        e = e * g
    w = z
    if SMOOTH:
        if HAS_WEIGHT:
            w = tl.load(class_weight + columns, mask=columns < n_classes, other=0.0).to(tl.float32)[None, :]
            w = tl.where(excluded, 0.0, w)
            below, amount = two_sums(tl.where(w == 0.0, 0.0, w * exponent), w)
        else:
            w = tl.where(excluded, 0.0, 1.0)
            below = tl.sum(tl.where(excluded, 0.0, exponent), 1)
            known = tl.maximum(tl.minimum(n_classes - first, z.shape[1]), 0)
            own = (y >= first) & (y < first + z.shape[1])
            amount = (known - own.to(tl.int32)).to(tl.float32)
        spread = state[5] + state[4] * (new - ref) - below
        if SOFTCAP or HAS_WEIGHT:
            v = w
            if SOFTCAP:
                v = w * g
            rho, square = two_sums(e * v, v * v)
            rho = rho / tl.where(square > 0.0, square, 1.0)
            left = e - rho[:, None] * v
        else:  # every v is 1
            square = amount
            rho = total / tl.maximum(amount, 1.0)
            left = tl.where(excluded, 0.0, e - rho[:, None])
        rho, s2, square = merge_fit(
            state[6] * scale, state[3] * (scale * scale), state[7], rho, tl.sum(left * left, 1), square
        )
        state = m, new, s, s2, state[4] + amount, spread, rho, square
    else:
        state = m, new, s, state[3] * (scale * scale) + tl.sum(e * e, 1)
    return state, e, w, scale


@triton.jit
def two_sums(a, b):
    """The sums of each row of a and of b. Joined, they are added where the product left them; b apart need not be."""
    return tl.split(tl.sum(tl.join(a, b), 1))


@triton.jit
def merge_fit(rho, s2, square, rho_, s2_, square_):
    """Least-squares fits of two disjoint sets of classes, joined: (rho, s2, square)."""
    total = square + square_
    share = tl.where(total > 0.0, square_ / tl.where(total > 0.0, total, 1.0), 0.0)
    delta = rho_ - rho
    return rho + delta * share, s2 + s2_ + delta * delta * (square * share), total
