"""Arithmetic that the kernels share: base-2 exponentials with an integer reference, log1p, soft cap, tile orders.

Sums of exponentials are kept relative to a power of two. For a row whose greatest logit so far is m,

    c = ceil(max(m, FLOOR) * log2 e)           an integer, the row's *reference*
    e = 2^(z log2 e - c)                       one fused multiply-add and one exponential

An integer reference makes rescaling (2^(c - c')) exact, and no contraction of multiplications into fused ones can
change it: the row's sums always mean the same thing. ``tl.fma`` is written out because z log2 e must not be rounded
before c is subtracted (that costs 2^-24 |z| in the exponent). FLOOR keeps c finite: a logit below -1e38 counts as
masked out, as -inf does. Every launch asks for ``enable_fp_fusion``: elsewhere a product and a sum may take one
instruction, and from Triton 3.10 on they take two by default.

No libdevice: it does not exist in the interpreter, so log1p and the soft cap are written in ``tl``.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1.0e38)
MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def reference_exponent(m):
    """The integer c of a row whose greatest logit is m, as float32; finite for m = -inf."""
    return tl.ceil(tl.maximum(m, FLOOR) * LOG2E)


@triton.jit
def exponential(x):
    """e^x at full relative accuracy: what rounding x log2 e to float32 loses (2^-24 |x|) is put back to first order."""
    y = x * LOG2E
    lost = tl.fma(x, LOG2E, -y)
    e = tl.exp2(y)
    return e + e * tl.where(tl.abs(lost) < 1.0, lost * LN2, 0.0)


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0, at full relative accuracy for small u: 2 atanh(u / (2 + u)) up to u = 1."""
    w = u / (u + 2.0)
    x = w * w
    series = 1.0 / 15.0 + x * (1.0 / 17.0)
    series = 1.0 / 13.0 + x * series
    series = 1.0 / 11.0 + x * series
    series = 1.0 / 9.0 + x * series
    series = 1.0 / 7.0 + x * series
    series = 1.0 / 5.0 + x * series
    series = 1.0 / 3.0 + x * series
    small = 2.0 * (w + w * (x * series))
    return tl.where(u < 1.0, small, tl.log(1.0 + u))


@triton.jit
def soft_cap(z, softcap):
    """(cap tanh(z / cap), its slope 1 - tanh^2) at full relative accuracy; NaN stays NaN, +-inf becomes +-cap, 0.

    With E = e^(-2 |x|) the slope is 4 E / (1 + E)^2 and tanh |x| is 1 - 2 E / (1 + E); below 0.625, where that cancels,
    the odd polynomial of Cephes' tanhf. Eager torch's 1 - tanh^2 loses everything for logits near the cap.
    """
    x = z / softcap
    e = tl.exp2(tl.abs(x) * -2.0 * LOG2E)
    fraction = e / (1.0 + e)
    large = 1.0 - 2.0 * fraction
    s = x * x
    p = s * -5.70498872745e-3 + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    small = x + x * (s * p)
    t = tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0.0, -large, large))
    return softcap * t, 4.0 * fraction / (1.0 + e)


@triton.jit
def mean_unit(n, mass):
    """The scale n / mass of the mean of n rows, by the float64 mass of the valid ones; 0 where that is 0."""
    return tl.where(mass > 0.0, n / tl.where(mass > 0.0, mass, 1.0), 0.0).to(tl.float32)


@triton.jit
def grouped_tile(pid, n_row_tiles, n_splits, GROUP: tl.constexpr):
    """(row tile, class split) of a program: GROUP row tiles walk the classes together and share them in the L2."""
    width = GROUP * n_splits
    first = (pid // width) * GROUP
    size = tl.minimum(n_row_tiles - first, GROUP)
    return first + (pid % width) % size, (pid % width) // size


@triton.jit
def triangle_tile(pid):
    """(i, j), j <= i, of the pid-th tile of a lower triangle; the square root is corrected in integers."""
    i = ((tl.sqrt(8.0 * pid.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > pid, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= pid, i + 1, i)
    return i, pid - i * (i + 1) // 2
