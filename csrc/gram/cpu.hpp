// The Gram matrix of the per-sample gradients, K = (R R^T) o (H H^T + 1), and row-wise inner products.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// R is (n, classes), H is (n, features).
struct GramShape {
  std::int64_t n, classes, features;
};

// Numbers in both factors, packed in blocks of 64 rows.
inline std::int64_t packed_count(const GramShape& shape) {
  return (shape.n + 63) / 64 * 64 * (shape.classes + shape.features);
}

// The factors of a Gram matrix that is formed row by row; `packed` as in gram_f32.
template <class T>
struct GramRows {
  const T *r, *h, *packed;
  GramShape shape;
  T bias;
};

SELBP_DECLARE_LEVELS(
    // out (n, n) = (r r^T) o (h h^T + bias), symmetric bit for bit; all contiguous. `packed` is scratch for
    // packed_count(shape) numbers. Returns whether the diagonal is finite.
    bool gram_f32(float* out, float* packed, const float* r, const float* h, GramShape shape, float bias,
                  int n_threads);
    bool gram_f64(double* out, double* packed, const double* r, const double* h, GramShape shape, double bias,
                  int n_threads);
    // Fills `packed`, which is what of.packed points to, and the diagonal of `out` (n, n). Returns whether every entry
    // is known to be finite: by Cauchy-Schwarz it is if no diagonal entry exceeds half of the largest number.
    bool gram_diagonal_f32(float* out, const GramRows<float>& of, float* packed);
    bool gram_diagonal_f64(double* out, const GramRows<double>& of, double* packed);
    // Row `row`, and row `other` where it is not -1, in their places in `out` (n, n): the numbers that `gram` gives.
    void gram_rows_f32(float* out, const GramRows<float>& of, std::int64_t row, std::int64_t other);
    void gram_rows_f64(double* out, const GramRows<double>& of, std::int64_t row, std::int64_t other);
    // sums[i] = sum_j a_ij b_ij in float64; both (rows, columns), contiguous.
    void row_dots_f32(double* sums, const float* a, const float* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);
    void row_dots_f64(double* sums, const double* a, const double* b, std::int64_t rows, std::int64_t columns,
                      int n_threads);)

#ifdef SELBP_BFLOAT16_PRODUCTS
namespace v4 {
// gram_f32 of bfloat16 factors, whose terms lie in pairs: a float stands for two, and `shape` counts pairs. Only where
// multiplies_bfloat16().
bool gram_bf16(float* out, float* packed, const float* r, const float* h, GramShape shape, float bias, int n_threads);
}  // namespace v4
#endif

}  // namespace selbp
