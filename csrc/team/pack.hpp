// A group of columns in SIMD registers: `Pack<T, lines>` is `lines` cache lines of T, spread over as many of the
// machine's widest registers (cpu/simd.hpp) as that takes.
#pragma once

#include "cpu/simd.hpp"
#include "team/team.hpp"

#pragma GCC diagnostic ignored "-Wpsabi"  // packs are never passed to a function that is not inlined

namespace selbp {
namespace SELBP_LEVEL {

constexpr int kLineBytes = 64;
// Lines a thread accumulates at once: enough chains to hide the latency of an FMA.
constexpr int kGroupLines = kVectorBytes == 64 ? 8 : kVectorBytes == 32 ? 4 : 2;

template <class T, int lines>
struct PackMask {
  static constexpr int kRegisters = lines * kLineBytes / kVectorBytes;
  typename Simd<T>::I v[kRegisters];
};

template <class T, int lines>
struct Pack {
  static constexpr int kRegisters = lines * kLineBytes / kVectorBytes;
  static constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V v[kRegisters];

  SELBP_HD static Pack fill(T value) {
    Pack out;
#pragma GCC unroll 32
    for (int r = 0; r < kRegisters; ++r) out.v[r] = splat(value);
    return out;
  }
};

// One definition for each operator: the registers of a pack are independent.
#define SELBP_PACK_OPERATOR(result, symbol)                                                            \
  template <class T, int lines>                                                                        \
  SELBP_HD result<T, lines> operator symbol(Pack<T, lines> a, Pack<T, lines> b) {                      \
    result<T, lines> out;                                                                              \
    _Pragma("GCC unroll 32") for (int r = 0; r < out.kRegisters; ++r) out.v[r] = a.v[r] symbol b.v[r]; \
    return out;                                                                                        \
  }                                                                                                    \
  template <class T, int lines>                                                                        \
  SELBP_HD result<T, lines> operator symbol(Pack<T, lines> a, T b) {                                   \
    return a symbol Pack<T, lines>::fill(b);                                                           \
  }
SELBP_PACK_OPERATOR(Pack, +)
SELBP_PACK_OPERATOR(Pack, *)
SELBP_PACK_OPERATOR(Pack, /)
SELBP_PACK_OPERATOR(PackMask, >)
SELBP_PACK_OPERATOR(PackMask, >=)
SELBP_PACK_OPERATOR(PackMask, <=)
#undef SELBP_PACK_OPERATOR

template <class T, int lines>
SELBP_HD PackMask<T, lines> operator&(PackMask<T, lines> a, PackMask<T, lines> b) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) a.v[r] &= b.v[r];
  return a;
}
template <class T, int lines>
SELBP_HD Pack<T, lines> operator-(Pack<T, lines> a) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) a.v[r] = -a.v[r];
  return a;
}
template <class T, int lines>
SELBP_HD PackMask<T, lines> operator!(PackMask<T, lines> a) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) a.v[r] = ~a.v[r];
  return a;
}

template <class T, int lines>
SELBP_HD Pack<T, lines> fused(Pack<T, lines> a, Pack<T, lines> b, Pack<T, lines> c) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) c.v[r] = fma(a.v[r], b.v[r], c.v[r]);
  return c;
}
template <class T, int lines>
SELBP_HD Pack<T, lines> fused(T a, Pack<T, lines> b, Pack<T, lines> c) {
  return fused(Pack<T, lines>::fill(a), b, c);
}
template <class T, int lines>
SELBP_HD Pack<T, lines> choose(PackMask<T, lines> condition, Pack<T, lines> a, Pack<T, lines> b) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) a.v[r] = condition.v[r] ? a.v[r] : b.v[r];
  return a;
}
template <class T, int lines>
SELBP_HD Pack<T, lines> choose(PackMask<T, lines> condition, Pack<T, lines> a, T b) {
  return choose(condition, a, Pack<T, lines>::fill(b));
}
template <class T, int lines>
SELBP_HD Pack<T, lines> magnitude(Pack<T, lines> a) {
#pragma GCC unroll 32
  for (int r = 0; r < a.kRegisters; ++r) a.v[r] = a.v[r] < 0 ? -a.v[r] : a.v[r];
  return a;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
