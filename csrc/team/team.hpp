// A *team* runs one algorithm on one problem: a CPU thread with SIMD registers, a CUDA block, a cooperative grid.
//
// The algorithm is a template over the team and is written once. It sees three kinds of loop:
//
//   team.each(count, f)            f(i) for i in [0, count), scalar work, any order, any item on any thread
//   team.once(f)                   f() on one thread
//   team.columns(main, count, f)   f(j) for groups of columns that together cover [0, count); no group straddles `main`
//   team.broadcast(count, f)       f(i) for i in [0, count), by every block for the arrays it keeps to itself
//   team.argmax(main, count, f)    columns, where f(j, vote) proposes vote.score >= 0 and may raise vote.flag and
//                                  vote.spoiled; returns the greatest score, the lowest column that has it, and
//                                  whether any column was flagged or spoiled
//   team.turn(row)                 before `row` joins: a chance to form it, or to fetch what comes after this problem
//   team.sync()                    everything written before is seen by every thread after
//
// `j` stands for the columns that a thread handles at once: one on a GPU, a group of SIMD registers on a CPU. It loads
// and stores (`j.load(array)`, `j.load(panels, row)`), and its values have operators, `fused` and `choose`.
//
// The rule that makes every team give the same bits: between two syncs an item touches nothing but its own column,
// a column accumulates in a fixed order with explicit `fused`, and the arg max is exact (compare and copy, no sums).
// Neither the number of threads nor their schedule can then change a result. columns and each do not synchronise;
// argmax does (its result is known to every thread when it returns).
//
// Everything lies in the namespace SELBP_LEVEL, which the build names for each instruction set, so that the linker
// cannot merge code that was compiled for different machines.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#ifndef SELBP_LEVEL
#error "SELBP_LEVEL must name the namespace of this build"
#endif

#if defined(__CUDACC__)
#define SELBP_HD __device__ __forceinline__
#define SELBP_METHOD __device__ __forceinline__
#define SELBP_BOTH __host__ __device__ __forceinline__
#define SELBP_INLINE_LAMBDA
#define SELBP_UNROLL _Pragma("unroll")
#define SELBP_UNROLL_ROWS _Pragma("unroll 8")  // several loads under way before the first is needed
#else
#define SELBP_HD inline __attribute__((always_inline))
#define SELBP_METHOD inline
#define SELBP_BOTH inline
#define SELBP_INLINE_LAMBDA __attribute__((always_inline))
#define SELBP_UNROLL _Pragma("GCC unroll 8")
#define SELBP_UNROLL_ROWS
#endif

namespace selbp {
namespace SELBP_LEVEL {

// a * b + c in one rounding, wherever the machine has the instruction: a library call for each column would cost more
// than everything else, so the x86-64 baseline rounds twice.
#if defined(__CUDACC__) || defined(__FP_FAST_FMAF)
SELBP_HD float fused(float a, float b, float c) { return fmaf(a, b, c); }
SELBP_HD double fused(double a, double b, double c) { return fma(a, b, c); }
#else
SELBP_HD float fused(float a, float b, float c) { return a * b + c; }
SELBP_HD double fused(double a, double b, double c) { return a * b + c; }
#endif
SELBP_HD float square_root(float x) { return sqrtf(x); }
SELBP_HD double square_root(double x) { return sqrt(x); }
template <class T>
SELBP_HD T choose(bool condition, T a, T b) {
  return condition ? a : b;
}
template <class T>
SELBP_HD T magnitude(T x) {
  return x < T(0) ? -x : x;
}

#if defined(__CUDACC_RTC__)  // NVRTC has none of the builtins
#define SELBP_CONSTANT(type, builtin, bits) __builtin_bit_cast(type, bits)
#else
#define SELBP_CONSTANT(type, builtin, bits) builtin
#endif
template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kMax = 3.402823466e+38f;
  static constexpr float kInfinity = SELBP_CONSTANT(float, __builtin_huge_valf(), 0x7f800000u);
  static constexpr float kNaN = SELBP_CONSTANT(float, __builtin_nanf(""), 0x7fc00000u);
};
template <>
struct Limits<double> {
  static constexpr double kMax = 1.7976931348623157e+308;
  static constexpr double kInfinity = SELBP_CONSTANT(double, __builtin_huge_val(), 0x7ff0000000000000ull);
  static constexpr double kNaN = SELBP_CONSTANT(double, __builtin_nan(""), 0x7ff8000000000000ull);
};

// What an arg max returns. Index -1 with a score below 0 means that no column proposed itself.
template <class T>
struct Best {
  T score;
  int index;
  bool flag, spoiled;
};

// Exact and associative, so that the order of a reduction cannot matter; the lowest index wins ties.
template <class T>
SELBP_HD Best<T> better(Best<T> a, Best<T> b) {
  const bool second = b.score > a.score || (b.score == a.score && b.index < a.index);
  return {second ? b.score : a.score, second ? b.index : a.index, a.flag || b.flag, a.spoiled || b.spoiled};
}

// Rows of the tableau, stored in panels of a few columns: within a panel, row follows row. A thread that sweeps its
// columns down the rows then reads memory from front to back. `height` is odd, so that equal rows of different panels
// fall into different sets of a cache (and different banks of shared memory).
template <class T, int width>
struct Panels {
  T* data;
  int height;

  SELBP_HD T* at(int row, int column) const {
    return data + (std::size_t(column / width) * std::size_t(height) + std::size_t(row)) * width + column % width;
  }
};

SELBP_BOTH int round_up(int count, int multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace SELBP_LEVEL
}  // namespace selbp
