// One SIMD register of the level that this file is compiled for: what the statistics, residuals, Gram matrix, mean
// gradient and solver are written in.
//
// GCC/Clang vector extensions do the arithmetic, of 16 bytes on aarch64, where they are NEON's registers. Intrinsics
// appear only where -ffp-contract=off (the solver needs it) would keep the compiler from fusing a multiply-add, and for
// half-precision conversion (in their maskz forms: GCC 12 warns of its own header's plain ones).
// scripts/test_aarch64.sh sees that NEON's fused multiply-adds are in use.
//
// Included by per-level cpu.cpp files only. Everything stands in the level's namespace, so that the linker cannot put a
// copy compiled for one level into another one's path. On top of it: cpu/exp.hpp, team/pack.hpp.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define SELBP_INLINE inline __attribute__((always_inline))
#define SELBP_LAMBDA __attribute__((always_inline))

namespace selbp {
namespace SELBP_LEVEL {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The vector of a compute type A (float or double): V its values, I integers of the same width.
template <class A>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int kLanes = kVectorBytes / 4;
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, readable in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kExpLow = -87.33f, kExpHigh = 88.0f;
  static constexpr int kMantissa = 23, kBias = 127;
};

template <>
struct Simd<double> {
  static constexpr int kLanes = kVectorBytes / 8;
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93145751953125e-1, kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kExpLow = -708.0, kExpHigh = 709.0;
  static constexpr int kMantissa = 52, kBias = 1023;
};

using F32 = Simd<float>::V;
using F64 = Simd<double>::V;

// a * b + c, fused where the level has it.
SELBP_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
SELBP_INLINE F64 fma(F64 a, F64 b, F64 c) {
#if defined(__AVX512F__)
  return (F64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (F64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (F64)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// The greater of a and b; b where a is NaN.
SELBP_INLINE F32 maximum(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F32)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
SELBP_INLINE F64 maximum(F64 a, F64 b) { return a > b ? a : b; }

template <class A>
SELBP_INLINE typename Simd<A>::V splat(A x) {
  return x - typename Simd<A>::V{};  // x - 0, not x + 0: keeps the sign of zero
}

// Unaligned loads of one vector's worth of elements, widened to the compute type.
SELBP_INLINE F32 load(const float* p) {
  F32 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
SELBP_INLINE F64 load(const double* p) {
  F64 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));
SELBP_INLINE F32 load(const BFloat16* p) {
  U16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return (F32)(__builtin_convertvector(v, U32) << 16);
}
SELBP_INLINE F32 load(const Half* p) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (F32)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  U16 v;
  __builtin_memcpy(&v, p, sizeof v);
  const U32 h = __builtin_convertvector(v, U32);
  const F32 scaled = (F32)((h & 0x7fffu) << 13) * 0x1p112f;  // rebias the exponent; exact for subnormals too
  const U32 special = (U32)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return (F32)((U32)scaled | special | ((h & 0x8000u) << 16));
#endif
}

// The first `count` < kLanes elements, zeros behind them; nothing beyond is read.
template <class T>
SELBP_INLINE auto load_first(const T* p, int64_t count) {
  T values[sizeof(load(p)) / sizeof(load(p)[0])] = {};
  __builtin_memcpy(values, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(values);
}
#if defined(__AVX512F__)  // saves the store-to-load stall of the copy
SELBP_INLINE F32 load_first(const float* p, int64_t count) {
  return (F32)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
#endif

template <class V, class A>
SELBP_INLINE void store(A* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// v, read from memory once: GCC would repeat the load for each multiply-add with v, and loads bound such loops.
template <class V>
SELBP_INLINE V held(V v) {
#if defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// A vector of `kCount` lanes of A, and the two halves of one. Lanes are reduced by halving: short dependency chains,
// and every step stays in registers.
template <class A, int kCount>
struct Lanes {
  typedef A V __attribute__((vector_size(kCount * sizeof(A))));
};
template <class Half, class V>
SELBP_INLINE void halve(const V& v, Half& low, Half& high) {
  static_assert(2 * sizeof(Half) == sizeof(V), "half a vector");
  __builtin_memcpy(&low, &v, sizeof low);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
}

// Both halves as doubles.
SELBP_INLINE void widen(F32 v, F64& low, F64& high) {
  Lanes<float, Simd<float>::kLanes / 2>::V first, second;
  halve(v, first, second);
#if defined(__AVX512F__)  // GCC 12 makes two instructions and a join of __builtin_convertvector
  low = (F64)_mm512_maskz_cvtps_pd(0xff, (__m256)first);
  high = (F64)_mm512_maskz_cvtps_pd(0xff, (__m256)second);
#else
  low = __builtin_convertvector(first, F64);
  high = __builtin_convertvector(second, F64);
#endif
}

template <int kCount, class V>
SELBP_INLINE double sum_doubles(V v) {
  if constexpr (kCount == 2) {
    return v[0] + v[1];
  } else {
    typename Lanes<double, kCount / 2>::V low, high;
    halve(v, low, high);
    return sum_doubles<kCount / 2>(low + high);
  }
}
template <class A>
SELBP_INLINE double sum(typename Simd<A>::V v) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return sum_doubles<Simd<A>::kLanes>(v);
  } else {
    F64 low, high;
    widen(v, low, high);
    return sum_doubles<Simd<A>::kLanes / 2>(low + high);
  }
}

template <class A, int kCount, class V>
SELBP_INLINE A greatest_lane(V v) {
  if constexpr (kCount == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    typename Lanes<A, kCount / 2>::V low, high;
    halve(v, low, high);
    return greatest_lane<A, kCount / 2>(low > high ? low : high);
  }
}
template <class A>
SELBP_INLINE A greatest(typename Simd<A>::V v) {  // of its lanes, none of them NaN
  return greatest_lane<A, Simd<A>::kLanes>(v);
}

// 0, 1, 2, ... in the lanes.
template <class A>
SELBP_INLINE typename Simd<A>::I lane_numbers() {
  typename Simd<A>::I lane;
  for (int i = 0; i < Simd<A>::kLanes; ++i) lane[i] = i;
  return lane;
}

// Lane i holds lane i + by, around the end.
template <int by, class V>
SELBP_INLINE V rotated(V v) {
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

}  // namespace SELBP_LEVEL
}  // namespace selbp
