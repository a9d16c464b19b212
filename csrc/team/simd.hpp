// A group of columns in SIMD registers: `Pack<T, lines>` is `lines` cache lines of T, spread over as many of the
// machine's widest registers as that takes. GCC's vector types supply the operators; only the fused multiply-add
// needs an intrinsic.
#pragma once

#include "team/team.hpp"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif
#pragma GCC diagnostic ignored "-Wpsabi"  // packs are never passed to a function that is not inlined

namespace selbp {
namespace SELBP_LEVEL {

constexpr int kLineBytes = 64;
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kGroupLines = 8;  // lines a thread accumulates at once: enough chains to hide the latency of an FMA
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kGroupLines = 4;
#else
constexpr int kVectorBytes = 16;
constexpr int kGroupLines = 2;
#endif

template <class T>
struct Register;
template <>
struct Register<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef std::int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Register<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef std::int64_t Mask __attribute__((vector_size(kVectorBytes)));
};

template <class V>
SELBP_HD V fused_register(V a, V b, V c) {
  return a * b + c;
}
#if defined(__AVX512F__)
template <>
SELBP_HD Register<float>::Value fused_register(Register<float>::Value a, Register<float>::Value b,
                                               Register<float>::Value c) {
  return _mm512_fmadd_ps(a, b, c);
}
template <>
SELBP_HD Register<double>::Value fused_register(Register<double>::Value a, Register<double>::Value b,
                                                Register<double>::Value c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
template <>
SELBP_HD Register<float>::Value fused_register(Register<float>::Value a, Register<float>::Value b,
                                               Register<float>::Value c) {
  return _mm256_fmadd_ps(a, b, c);
}
template <>
SELBP_HD Register<double>::Value fused_register(Register<double>::Value a, Register<double>::Value b,
                                                Register<double>::Value c) {
  return _mm256_fmadd_pd(a, b, c);
}
#elif defined(__ARM_NEON) && defined(__aarch64__)
template <>
SELBP_HD Register<float>::Value fused_register(Register<float>::Value a, Register<float>::Value b,
                                               Register<float>::Value c) {
  return (Register<float>::Value)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
template <>
SELBP_HD Register<double>::Value fused_register(Register<double>::Value a, Register<double>::Value b,
                                                Register<double>::Value c) {
  return (Register<double>::Value)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#endif

// Lane i holds lane i + by, around the end.
template <int by, class V>
SELBP_HD V rotated(V v) {
  constexpr int kLanes = int(sizeof(V) / sizeof(v[0]));
#if defined(__clang__)
  V out;
  for (int i = 0; i < kLanes; ++i) out[i] = v[(i + by) % kLanes];
  return out;
#else
  decltype(v > v) from;
  for (int i = 0; i < kLanes; ++i) from[i] = (i + by) % kLanes;
  return __builtin_shuffle(v, from);
#endif
}

template <class T, int lines>
struct PackMask {
  static constexpr int kRegisters = lines * kLineBytes / kVectorBytes;
  typename Register<T>::Mask v[kRegisters];
};

template <class T, int lines>
struct Pack {
  static constexpr int kRegisters = lines * kLineBytes / kVectorBytes;
  static constexpr int kLanes = kVectorBytes / int(sizeof(T));
  typename Register<T>::Value v[kRegisters];

  SELBP_HD static Pack fill(T value) {
    Pack out;
#pragma GCC unroll 32
    for (int r = 0; r < kRegisters; ++r) out.v[r] = value - typename Register<T>::Value{};  // a mere broadcast
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
  for (int r = 0; r < a.kRegisters; ++r) c.v[r] = fused_register(a.v[r], b.v[r], c.v[r]);
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
