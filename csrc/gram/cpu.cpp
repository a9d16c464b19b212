// The panel kernel multiplies two GEMM panels and writes the product twice, the second time transposed. A transposed
// store of one element would touch a cache line of its own, so the panel is walked in square blocks: the product goes
// to a block in L1 and, row by row, to its place; then 8 x 8 corners of the block are transposed in registers and
// gathered in a second block, which also goes out row by row. (Storing the corners themselves to rows that lie a
// multiple of 4 KiB apart was twice as slow.)
#include "gram/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr std::int64_t kBlock = 64;
constexpr std::int64_t kCorner = 8;

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kCorner * sizeof(T))));
};

#if defined(__clang__)
#define SELBP_INTERLEAVE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SELBP_INTERLEAVE(a, b, ...) __builtin_shuffle(a, b, typename Mask<T>::type{__VA_ARGS__})
template <typename T>
struct Mask;
template <>
struct Mask<float> {
  typedef std::int32_t type __attribute__((vector_size(kCorner * 4)));
};
template <>
struct Mask<double> {
  typedef std::int64_t type __attribute__((vector_size(kCorner * 8)));
};
#endif

// Interleaving row i with row i + 4, three times over, is a transposition: each pass rotates the 3 + 3 bits of
// (row, column) by one place.
template <typename T>
inline void transpose_corner(T* turned, const T* block) {
  using V = typename Vector<T>::type;
  V rows[kCorner], mixed[kCorner];
  for (int i = 0; i < kCorner; ++i) __builtin_memcpy(&rows[i], block + i * kBlock, sizeof(V));
  for (int pass = 0; pass < 3; ++pass) {
    for (int i = 0; i < kCorner / 2; ++i) {
      mixed[2 * i] = SELBP_INTERLEAVE(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      mixed[2 * i + 1] = SELBP_INTERLEAVE(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < kCorner; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < kCorner; ++i) __builtin_memcpy(turned + i * kBlock, &rows[i], sizeof(V));
}

// turned[j, i] = block[i, j]
template <typename T>
void transpose(T* turned, const T* block, std::int64_t i_count, std::int64_t j_count) {
  const std::int64_t i_whole = i_count - i_count % kCorner, j_whole = j_count - j_count % kCorner;
  for (std::int64_t j = 0; j < j_whole; j += kCorner)
    for (std::int64_t i = 0; i < i_whole; i += kCorner)
      transpose_corner(turned + j * kBlock + i, block + i * kBlock + j);
  for (std::int64_t j = 0; j < j_count; ++j)
    for (std::int64_t i = j < j_whole ? i_whole : 0; i < i_count; ++i) turned[j * kBlock + i] = block[i * kBlock + j];
}

template <typename T>
void write_rows(T* out, std::int64_t stride, const T* block, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < columns; ++j) out[i * stride + j] = block[i * kBlock + j];
}

// The rows that a block goes to lie n apart: too far for the hardware to see the next one coming.
template <typename T>
inline void prefetch_row(const T* row) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t j = 0; j < kBlock; j += kLine) __builtin_prefetch(row + j, 1);
}

// `out` points at the panel's own corner on the diagonal; (i0, j0) is the block's place in the panel, i0 >= j0.
template <typename T>
bool write_block(T* out, const T* rr, const T* hh, GramPanel panel, T bias, std::int64_t i0, std::int64_t j0) {
  const std::int64_t i_count = least(kBlock, panel.n - panel.begin - i0), j_count = least(kBlock, panel.width - j0);
  T* direct = out + i0 * panel.n + j0;
  T* mirror = out + j0 * panel.n + i0;
  alignas(64) T block[kBlock * kBlock];
  for (std::int64_t i = 0; i < i_count; ++i) {
    const T* a = rr + (i0 + i) * panel.width + j0;
    const T* b = hh + (i0 + i) * panel.width + j0;
    for (std::int64_t j = 0; j < j_count; ++j) block[i * kBlock + j] = a[j] * (b[j] + bias);
    prefetch_row(direct + i * panel.n);
    prefetch_row(mirror + least(i, j_count - 1) * panel.n);
  }
  bool finite = true;
  if (i0 == j0) {
    for (std::int64_t i = 0; i < j_count; ++i) {
      finite = finite && block[i * kBlock + i] - block[i * kBlock + i] == 0;
      for (std::int64_t j = i + 1; j < j_count; ++j) block[i * kBlock + j] = block[j * kBlock + i];
    }
  }
  write_rows(direct, panel.n, block, i_count, j_count);
  alignas(64) T turned[kBlock * kBlock];
  transpose(turned, block, i_count, j_count);
  write_rows(mirror, panel.n, turned, j_count, i_count);
  return finite;
}

template <typename T>
bool panel_of(T* out, const T* rr, const T* hh, GramPanel panel, T bias, int n_threads) {
  bool finite = true;
#pragma omp parallel for num_threads(n_threads) schedule(dynamic, 1) reduction(&& : finite)
  for (std::int64_t i = 0; i < panel.n - panel.begin; i += kBlock)
    for (std::int64_t j = 0; j < panel.width && j <= i; j += kBlock)
      finite = write_block(out + panel.begin * (panel.n + 1), rr, hh, panel, bias, i, j) && finite;
  return finite;
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

bool gram_panel_f32(float* out, const float* rr, const float* hh, GramPanel panel, float bias, int n_threads) {
  return panel_of(out, rr, hh, panel, bias, n_threads);
}
bool gram_panel_f64(double* out, const double* rr, const double* hh, GramPanel panel, double bias, int n_threads) {
  return panel_of(out, rr, hh, panel, bias, n_threads);
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
