// The pieces of a small float head's statistics in one sweep; included by per-level cpu.cpp files only.
//
// With 128 rows, 128 features and 10 classes a BLAS call is mostly set-up, and a row of 10 logits mostly the latency of
// reducing one vector. So the product keeps classes in the lanes, the sums then keep rows in them: nothing is reduced
// across lanes.
#pragma once

#include "statistics/rows.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr int kHeadLanes = Simd<float>::kLanes;

// w (classes, depth) as groups of kHeadLanes classes: [group][k][lane]; what lies behind the last class stays.
SELBP_INLINE void pack_head(const Matrix& w, float* packed) {
  for (int64_t c = 0; c < w.rows; ++c) {
    const float* from = static_cast<const float*>(w.data) + c * w.row_stride;
    float* to = packed + c / kHeadLanes * kHeadLanes * w.columns + c % kHeadLanes;
    for (int64_t k = 0; k < w.columns; ++k) to[k * kHeadLanes] = from[k];
  }
}

// out[r, 0..kHeadLanes) = x[r] . one group of classes, for kRows rows.
template <int kRows>
SELBP_INLINE void head_group(const float* x, int64_t x_stride, const float* group, int64_t depth, float* out,
                             int64_t out_stride) {
  F32 sums[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const F32 w = load(group + k * kHeadLanes);
    for (int r = 0; r < kRows; ++r) sums[r] = fma(splat(x[r * x_stride + k]), w, sums[r]);
  }
  for (int r = 0; r < kRows; ++r) store(out + r * out_stride, sums[r]);
}

// What kHeadLanes rows have accumulated over their classes other than the target; see RowState.
struct HeadState {
  float m[kHeadLanes], s[kHeadLanes], s2[kHeadLanes], z_y[kHeadLanes];
};

// logits [row][class] of kHeadLanes rows with targets y (-1: ignored), `stride` apart; scratch: [class][row].
SELBP_INLINE HeadState head_sums(const float* logits, int64_t stride, const float* bias, int64_t classes,
                                 const int32_t* y, float* scratch) {
  for (int64_t c = 0; c < classes; ++c)
    for (int r = 0; r < kHeadLanes; ++r) scratch[c * kHeadLanes + r] = logits[r * stride + c] + (bias ? bias[c] : 0.0f);
  Simd<float>::I target;
  __builtin_memcpy(&target, y, sizeof target);
  const F32 lowest = splat(float(-kInfinity)), zero{};
  F32 m = lowest, z_y = splat(__builtin_nanf(""));
  for (int64_t c = 0; c < classes; ++c) {
    const F32 v = load(scratch + c * kHeadLanes);
    m = target == int32_t(c) ? m : maximum(v, m);
    z_y = target == int32_t(c) ? v : z_y;
  }
  const F32 from = m > lowest ? m : zero;  // -inf - -inf would be NaN
  F32 s{}, s2{};
  for (int64_t c = 0; c < classes; ++c) {
    const F32 e = target == int32_t(c) ? zero : exp<float>(load(scratch + c * kHeadLanes) - from);
    s += e;
    s2 = fma(e, e, s2);
  }
  HeadState state;
  store(state.m, m);
  store(state.s, s);
  store(state.s2, s2);
  store(state.z_y, z_y);
  return state;
}

}  // namespace
}  // namespace SELBP_LEVEL
}  // namespace selbp
