// exp and tanh of a register, which never call libm.
#pragma once

#include "cpu/simd.hpp"

namespace selbp {
namespace SELBP_LEVEL {

// (e^r - 1) for |r| <= ln(2)/2 to about one unit in the last place.
SELBP_INLINE F32 expm1_reduced(F32 r) {
  F32 q = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));  // Cephes expf
  q = fma(q, r, splat(8.3334519073e-3f));
  q = fma(q, r, splat(4.1665795894e-2f));
  q = fma(q, r, splat(1.6666665459e-1f));
  q = fma(q, r, splat(5.0000001201e-1f));
  return fma(q * r, r, r);
}
SELBP_INLINE F64 expm1_reduced(F64 r) {
  F64 q = splat(1.0 / 6227020800.0);  // Taylor to r^13: the remainder is below 5e-18
  q = fma(q, r, splat(1.0 / 479001600.0));
  q = fma(q, r, splat(1.0 / 39916800.0));
  q = fma(q, r, splat(1.0 / 3628800.0));
  q = fma(q, r, splat(1.0 / 362880.0));
  q = fma(q, r, splat(1.0 / 40320.0));
  q = fma(q, r, splat(1.0 / 5040.0));
  q = fma(q, r, splat(1.0 / 720.0));
  q = fma(q, r, splat(1.0 / 120.0));
  q = fma(q, r, splat(1.0 / 24.0));
  q = fma(q, r, splat(1.0 / 6.0));
  q = fma(q, r, splat(0.5));
  return fma(q * r, r, r);
}

// e^x = scale * (1 + q), for x in [kExpLow, kExpHigh]; a NaN stays one in q.
template <class A>
struct Exponential {
  typename Simd<A>::V scale, q;
};
template <class A>
SELBP_INLINE Exponential<A> exponential(typename Simd<A>::V x) {
  using S = Simd<A>;
  using V = typename S::V;
  using I = typename S::I;
  const V shifted = fma(x, splat(A(1.44269504088896340736)), splat(S::kMagic));
  const V n = shifted - S::kMagic;
  V r = fma(n, splat(-S::kLn2High), x);
  r = fma(n, splat(-S::kLn2Low), r);
  const I magic = (I)splat(S::kMagic);
  const I exponent = ((I)shifted - magic + typename S::Int(S::kBias)) << S::kMantissa;
  return {(V)exponent, expm1_reduced(r)};
}

// e^x; 0 below kExpLow (so for -inf), e^kExpHigh above kExpHigh, NaN for NaN.
template <class A>
SELBP_INLINE typename Simd<A>::V exp(typename Simd<A>::V x) {
  using V = typename Simd<A>::V;
  const V low = splat(Simd<A>::kExpLow), high = splat(Simd<A>::kExpHigh);
  V clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const Exponential<A> e = exponential<A>(clamped);
  const V value = fma(e.scale, e.q, e.scale);
  return x < low ? V{} : value;
}

// cap * tanh(z / cap) and its derivative, with E = e^(-2|z/cap|): tanh = (1 - E) / (1 + E), derivative 4E / (1 + E)^2.
// 1 - E is taken as -expm1, so that small logits keep their relative accuracy.
template <class A>
SELBP_INLINE typename Simd<A>::V soft_cap(typename Simd<A>::V z, typename Simd<A>::V cap,
                                          typename Simd<A>::V& derivative) {
  using V = typename Simd<A>::V;
  const V x = z / cap;
  const V twice = x < V{} ? A(2) * x : A(-2) * x;
  const V low = splat(Simd<A>::kExpLow);
  const Exponential<A> e = exponential<A>(twice < low ? low : twice);
  const V minus = fma(e.scale, e.q, e.scale - A(1));  // E - 1
  const V plus = minus + A(2);                        // E + 1
  const V tanh = minus / plus;                        // of -|x|
  derivative = A(4) * (minus + A(1)) / (plus * plus);
  return cap * (x < V{} ? tanh : -tanh);
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
