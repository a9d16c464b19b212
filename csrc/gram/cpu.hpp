// What stands around the GEMMs of the Gram matrix and the mean gradient (math: K = (R R^T) o (H H^T + 1)).
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// A tile of the Gram matrix: rows [row, row + rows) and columns [column, column + columns), column >= row. On the
// diagonal (column == row, rows == columns) only the tile's own upper triangle is read.
struct GramTile {
  std::int64_t n, row, column, rows, columns;
};

SELBP_DECLARE_LEVELS(
    // out = (rr) o (hh + bias) in the tile and in its mirror image; rr and hh are (rows, columns), contiguous.
    void gram_tile_f32(float* out, const float* rr, const float* hh, GramTile tile, float bias, int n_threads);
    void gram_tile_f64(double* out, const double* rr, const double* hh, GramTile tile, double bias, int n_threads);
    // sums[i] = sum_j a_ij b_ij in float64; both (rows, columns), contiguous.
    void row_dots_f32(double* sums, const float* a, const float* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);
    void row_dots_f64(double* sums, const double* a, const double* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);)

}  // namespace selbp
