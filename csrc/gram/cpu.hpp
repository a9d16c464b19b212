// What stands around the GEMMs of the Gram matrix and the mean gradient (K = (R R^T) o (H H^T + 1)).
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// Columns [begin, begin + width) of an n x n Gram matrix, from the diagonal down: rows [begin, n).
struct GramPanel {
  std::int64_t n, begin, width;
};

SELBP_DECLARE_LEVELS(
    // out = (rr) o (hh + bias) in the panel and in its mirror image; rr and hh are (n - begin, width), contiguous.
    // Returns whether the panel's part of the diagonal is finite.
    bool gram_panel_f32(float* out, const float* rr, const float* hh, GramPanel panel, float bias, int n_threads);
    bool gram_panel_f64(double* out, const double* rr, const double* hh, GramPanel panel, double bias, int n_threads);
    // sums[i] = sum_j a_ij b_ij in float64; both (rows, columns), contiguous.
    void row_dots_f32(double* sums, const float* a, const float* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);
    void row_dots_f64(double* sums, const double* a, const double* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);)

}  // namespace selbp
