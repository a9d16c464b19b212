// The mean gradient of factors that the cache holds, and what follows from it. There a BLAS call and the torch calls
// around it take a good part of the time.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// The factors of n gradients g_i = r_i (x) [h_i, 1]: residual (n, classes) and features (n, width), contiguous.
template <class T>
struct GradientFactors {
  const T *residual, *features;
  std::int64_t n, classes, width;
  bool bias;
};

template <class T>
struct MeanGradientOutput {
  T *inner, *target_sq;        // (n,) g_i . M, and () ||M||^2; both summed in double
  T *head_weight, *head_bias;  // M (classes, width), and (classes,) where there is a bias
};

// Rows and weights that stand for the mean: k entries, an index below 0 is an empty slot.
template <class T>
struct WeightedRows {
  const std::int64_t* indices;
  const T* weights;
  std::int64_t k;
};

// Doubles of scratch that matching_residual works in.
constexpr std::int64_t residual_scratch(std::int64_t k, std::int64_t classes, std::int64_t width) {
  return (2 * width + k) * classes + k;
}

SELBP_DECLARE_LEVELS(
    // Both return whether the squared norm of M is finite: it is not where any entry of either factor is not, unless
    // there are no classes or no rows.
    bool mean_gradient_f32(const GradientFactors<float>& factors, const MeanGradientOutput<float>& output,
                           int n_threads);
    bool mean_gradient_f64(const GradientFactors<double>& factors, const MeanGradientOutput<double>& output,
                           int n_threads);
    // squares[0] = ||M - sum_j w_j g_j||^2, squares[1] = ||M||^2; the indices lie below n.
    void matching_residual(const GradientFactors<double>& factors, const WeightedRows<double>& chosen, double* squares,
                           double* scratch);)

}  // namespace selbp
