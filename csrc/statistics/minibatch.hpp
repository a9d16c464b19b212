// What a step reads of a minibatch's logits at once: statistics, the unit of its mean, and the residuals in that unit.
#pragma once

#include <cstdint>
#include <vector>

#include "statistics/cpu.hpp"

namespace selbp {

template <class A>  // the compute type of the logits
struct MinibatchOutput {
  A *loss, *lse, *residual_sq, *feature_sq;  // (n,); residual_sq in the unit
  bool *correct, *valid;                     // (n,)
  A *mass, *scaled;                          // (n,) what a row counts in the mean, and its loss in the unit
  A* scale;                                  // () the unit: n / (sum of the valid rows' masses), 0 where there is none
  std::int64_t* hits;                        // (2,) how many rows are correct, and valid
  A* residual;                               // (n, classes) in the unit, 0 in rows that are not valid; may be null
};

// Returns what `statistics` returns. weight_sum: as in ResidualTile.
template <class A>
std::int64_t score_minibatch(const Matrix& logits, const Matrix& features, bool feature_bias,
                             const LossOptions& options, double weight_sum, const MinibatchOutput<A>& out,
                             int n_threads) {
  const std::int64_t n = logits.rows, classes = logits.columns;
  const StatisticsOutput statistics{out.loss, out.lse,     out.residual_sq, out.feature_sq,
                                    nullptr,  out.correct, out.valid};
  const std::int64_t bad =
      SELBP_PICK(statistics)(logits, 0, classes, features, feature_bias, options, nullptr, statistics, n_threads);
  if (bad >= 0) return bad;

  const A* class_weight = static_cast<const A*>(options.class_weight);
  double total = 0;
  std::int64_t correct = 0, valid = 0;
  for (std::int64_t row = 0; row < n; ++row) {
    const std::int64_t y = options.target[row];
    const A mass = y == options.ignore_index ? A(0) : class_weight ? class_weight[y] : A(1);
    out.mass[row] = mass;
    total += out.valid[row] ? static_cast<double>(mass) : 0.0;
    correct += out.correct[row];
    valid += out.valid[row];
  }
  const A scale = A(total > 0 ? static_cast<double>(n) / total : 0.0), square = scale * scale;
  for (std::int64_t row = 0; row < n; ++row) {
    out.scaled[row] = out.loss[row] * scale;
    out.residual_sq[row] *= square;
  }
  *out.scale = scale;
  out.hits[0] = correct;
  out.hits[1] = valid;
  if (!out.residual) return -1;

  const std::vector<A> scales(static_cast<std::size_t>(n), scale);
  const ResidualTile tile{0, classes, weight_sum, out.lse, nullptr, scales.data()};
  SELBP_PICK(residual)(logits, tile, options, out.residual, n_threads);
  for (std::int64_t row = 0; row < n; ++row) {  // the features alone may have spoiled it
    A* of = out.residual + row * classes;
    for (std::int64_t c = 0; !out.valid[row] && c < classes; ++c) of[c] = A(0);
  }
  return -1;
}

}  // namespace selbp
