// Per-sample cross-entropy statistics and residuals of rows of logits; the header of the family.
//
// The logits come either whole or in column tiles (the linear form: a GEMM writes a tile, this consumes it). With the
// target's logit z_y held apart, each row accumulates over the other classes only, relative to their running maximum m:
//   s = sum e^(z-m),  s2 = sum g^2 e^(2(z-m)),  and with label smoothing  amount = sum w,  spread = sum w (m - z)
//                                                          (w class weights, g slope of the soft cap, else 1)
// from which loss, log-sum-exp and ||r||^2 follow without cancellation for confident rows:
//   loss_y = log1p(e^(m-z_y) s),  p_rest = 1 - p_y = e^(m-lse) s,  ||r||^2 = p_rest^2 + e^(2(m-lse)) s2.
// With label smoothing the sum over c != y is that of (x E - k V)^2, E = g e^(z-m), V = g w, which vanishes at the
// optimum and must not be expanded. It is kept as the least-squares fit of E by V (Welford's and Chan's update):
//   rho = E.V / V.V,  square = V.V,  s2 = ||E - rho V||^2,    ||x E - k V||^2 = x^2 s2 + (x rho - k)^2 square.
// The Triton kernels keep the same sums under the same names, relative to a power of two.
// Inside a tile lanes accumulate in the compute type (float, or double for double); across tiles everything is double.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

enum class Type : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// The options that both operators share. `class_weight` is in the compute type, or null.
struct LossOptions {
  const int64_t* target;
  const void* class_weight;
  int64_t ignore_index;
  double label_smoothing, softcap;
};

struct Matrix {  // rows with a contiguous last dimension
  const void* data;
  Type type;
  int64_t row_stride, rows, columns;
};

// What a row has accumulated so far; an array of these carries the rows from one tile to the next.
struct RowState {
  double m, s, s2, rho, square, spread, amount;
  double z_y, derivative_y;  // the target's logit after the cap, and the cap's slope there
};

// For vectors of up to 16 lanes: packed weights, and the logits of one vector's worth of rows, twice.
constexpr int64_t head_scratch(int64_t classes, int64_t depth) { return (classes + 15) / 16 * 16 * (depth + 32); }

constexpr int kStateDoubles = sizeof(RowState) / sizeof(double);

struct StatisticsOutput {  // floats in the compute type of the logits
  void *loss, *lse, *residual_sq, *feature_sq;
  void* p_rest;  // probability of all classes but the target; may be null
  bool *correct, *valid;
};

// Columns [first_class, first_class + logits.columns) of the residual of rows of n_classes.
struct ResidualTile {
  int64_t first_class, n_classes;
  double weight_sum;   // of all class weights; n_classes without them
  const void* lse;     // and the rest, one value a row in the compute type
  const void* p_rest;  // as in StatisticsOutput; null: summed here, for which the tile must be the whole row
  const void* scale;   // what each row is multiplied with; null: 1
};

// All return the first row whose target lies outside [0, n_classes) and is not ignored (nothing is read through it),
// or -1.
//
// statistics: consumes columns [first_class, first_class + logits.columns) of n_classes. The first tile initialises
// `state` (rows entries; null where one tile is the whole row), the last one writes `output`. `features.data` may be
// null: feature_sq is then 1.
// head_statistics: `statistics` of features @ weight.T + bias, all float, without smoothing and cap; serial, and meant
// for small heads. `scratch` holds head_scratch(classes, depth) zeros.
// residual: (rows, columns) softmax minus target, times the chain factor of the cap and `scale`; 0 in rows that are
// not valid. `output` may be the logits' own memory where they have the compute type and no padding.
SELBP_DECLARE_LEVELS(int64_t statistics(const Matrix& logits, int64_t first_class, int64_t n_classes,
                                        const Matrix& features, bool feature_bias, const LossOptions& options,
                                        RowState* state, const StatisticsOutput& output, int n_threads);
                     int64_t head_statistics(const Matrix& features, const Matrix& weight, const float* bias,
                                             const LossOptions& options, const StatisticsOutput& output,
                                             float* scratch);
                     int64_t residual(const Matrix& logits, const ResidualTile& tile, const LossOptions& options,
                                      void* output, int n_threads);)

}  // namespace selbp
