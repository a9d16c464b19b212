// How the kernels of this family walk a row of logits; included by per-level cpu.cpp files only (see cpu/simd.hpp).
//
// A row is walked in chunks of one vector. Only the chunk that holds the target and the ragged last one (the edges)
// mask lanes; every other chunk runs unmasked.
#pragma once

#include "cpu/exp.hpp"
#include "statistics/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr int64_t kBlock = 2048;  // columns per block: it stays in L1 between the maximum and the sums, and short
                                  // blocks keep a float lane's sum accurate
constexpr double kInfinity = __builtin_inf();

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// The chunk of a block that starts at `offset` and has `count` columns: a whole chunk, or the block's ragged end, for
// which the block's last kLanes columns are loaded where it has that many. `present` marks the lanes that belong to
// the chunk, without lane `skip` of it (-1: none).
template <class T>
struct Edge {
  using S = Simd<Compute<T>>;
  typename S::V v;
  typename S::I present;
  int64_t start;  // column of lane 0

  SELBP_INLINE Edge(const T* block, int64_t columns, int64_t offset, int64_t count, int64_t skip) : start(offset) {
    using Int = typename S::Int;
    const typename S::I lane = lane_numbers<Compute<T>>();
    Int first = 0;
    if (count == S::kLanes) {
      v = load(block + offset);
    } else if (columns >= S::kLanes) {
      start = columns - S::kLanes;
      first = Int(S::kLanes - count);
      v = load(block + start);
    } else {
      v = load_first(block + offset, count);
    }
    present = (lane >= first) & (lane < Int(first + count)) & (lane != (skip < 0 ? Int(-1) : Int(first + skip)));
  }
};

// Calls plain(offset) for each whole chunk of `columns` without `y`, edge(offset, count, lane of y or -1) for others.
template <int kLanes, class Plain, class AtEdge>
SELBP_INLINE void for_each_chunk(int64_t columns, int64_t y, Plain&& plain, AtEdge&& edge) {
  const int64_t whole = columns / kLanes * kLanes;
  const bool inside = y >= 0 && y < columns;
  const int64_t held = inside ? y / kLanes * kLanes : whole;
  for (int64_t c = 0; c < (held < whole ? held : whole); c += kLanes) plain(c);
  if (inside && held < whole) {
    edge(held, int64_t(kLanes), y - held);
    for (int64_t c = held + kLanes; c < whole; c += kLanes) plain(c);
  }
  if (whole < columns) edge(whole, columns - whole, inside && held == whole ? y - held : int64_t(-1));
}

template <class T>
SELBP_INLINE double cap_one(T z, double softcap, double* derivative = nullptr) {
  using A = Compute<T>;
  typename Simd<A>::V d;
  const auto capped = soft_cap<A>(load_first(&z, 1), splat(A(softcap)), d);
  if (derivative) *derivative = static_cast<double>(d[0]);
  return static_cast<double>(capped[0]);
}

template <class T>
SELBP_INLINE double widen(T z) {
  return static_cast<double>(load_first(&z, 1)[0]);
}

int64_t first_bad_target(const LossOptions& options, int64_t rows, int64_t n_classes) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = options.target[row];
    if (y != options.ignore_index && (y < 0 || y >= n_classes)) return row;
  }
  return -1;
}

// Calls body.run<T, smooth, cap>() for the run-time options.
template <class T, class Body>
void dispatch_options(const LossOptions& options, Body&& body) {
  const bool smooth = options.label_smoothing > 0, cap = options.softcap > 0;
  if (smooth && cap) {
    body.template run<T, true, true>();
  } else if (smooth) {
    body.template run<T, true, false>();
  } else if (cap) {
    body.template run<T, false, true>();
  } else {
    body.template run<T, false, false>();
  }
}

template <class Body>
void dispatch(Type type, const LossOptions& options, Body&& body) {
  switch (type) {
    case Type::f32: return dispatch_options<float>(options, body);
    case Type::f64: return dispatch_options<double>(options, body);
    case Type::bf16: return dispatch_options<BFloat16>(options, body);
    case Type::f16: return dispatch_options<Half>(options, body);
  }
}

}  // namespace
}  // namespace SELBP_LEVEL
}  // namespace selbp
