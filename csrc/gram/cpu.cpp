// The tile kernel multiplies two GEMM tiles and writes the product twice, the second time transposed. A transposed
// store of one element touches a cache line of its own, so the tile is walked in blocks of kBlock x kBlock whose
// mirror image stays in L1 while it is filled row by row.
#include "gram/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr std::int64_t kBlock = 32;

template <typename T>
void write_block(T* out, const T* rr, const T* hh, const GramTile& tile, T bias, std::int64_t i0, std::int64_t j0) {
  const std::int64_t i1 = i0 + kBlock < tile.rows ? i0 + kBlock : tile.rows;
  const std::int64_t j1 = j0 + kBlock < tile.columns ? j0 + kBlock : tile.columns;
  const bool diagonal = tile.row == tile.column && i0 == j0;
  T block[kBlock][kBlock];
  for (std::int64_t i = i0; i < i1; ++i) {
    const T* a = rr + i * tile.columns + j0;
    const T* b = hh + i * tile.columns + j0;
    T* line = block[i - i0];
    for (std::int64_t j = 0; j < j1 - j0; ++j) line[j] = a[j] * (b[j] + bias);
  }
  if (diagonal) {
    for (std::int64_t i = 1; i < i1 - i0; ++i)
      for (std::int64_t j = 0; j < i; ++j) block[i][j] = block[j][i];
  }
  for (std::int64_t i = i0; i < i1; ++i) {
    T* line = out + (tile.row + i) * tile.n + tile.column + j0;
    for (std::int64_t j = 0; j < j1 - j0; ++j) line[j] = block[i - i0][j];
  }
  if (diagonal) return;
  for (std::int64_t j = j0; j < j1; ++j) {
    T* line = out + (tile.column + j) * tile.n + tile.row + i0;
    for (std::int64_t i = 0; i < i1 - i0; ++i) line[i] = block[i][j - j0];
  }
}

template <typename T>
void tile_of(T* out, const T* rr, const T* hh, const GramTile& tile, T bias, int n_threads) {
  const bool diagonal = tile.row == tile.column;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1)
  for (std::int64_t i = 0; i < tile.rows; i += kBlock)
    for (std::int64_t j = diagonal ? i : 0; j < tile.columns; j += kBlock) write_block(out, rr, hh, tile, bias, i, j);
}

// Eight partial sums in a fixed order, so that the result does not depend on the vector width or the thread count.
template <typename T>
double dot(const T* a, const T* b, std::int64_t count) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  std::int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += static_cast<double>(a[j + l]) * static_cast<double>(b[j + l]);
  for (; j < count; ++j) lanes[0] += static_cast<double>(a[j]) * static_cast<double>(b[j]);
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

template <typename T>
void dots_of(double* sums, const T* a, const T* b, std::int64_t rows, std::int64_t columns, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (std::int64_t i = 0; i < rows; ++i) sums[i] = dot(a + i * columns, b + i * columns, columns);
}

}  // namespace

void gram_tile_f32(float* out, const float* rr, const float* hh, GramTile tile, float bias, int n_threads) {
  tile_of(out, rr, hh, tile, bias, n_threads);
}
void gram_tile_f64(double* out, const double* rr, const double* hh, GramTile tile, double bias, int n_threads) {
  tile_of(out, rr, hh, tile, bias, n_threads);
}
void row_dots_f32(double* sums, const float* a, const float* b, std::int64_t rows, std::int64_t columns,
                  int n_threads) {
  dots_of(sums, a, b, rows, columns, n_threads);
}
void row_dots_f64(double* sums, const double* a, const double* b, std::int64_t rows, std::int64_t columns,
                  int n_threads) {
  dots_of(sums, a, b, rows, columns, n_threads);
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
