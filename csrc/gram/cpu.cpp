// The Gram matrix in square blocks of one triangle, each computed, multiplied and written twice while it is in L1; the
// full products never exist. Both factors are packed first, in strips of kBlock rows, term by term, so that a block's
// two operands are read in order.
#include "gram/cpu.hpp"

#include "gram/blocks.hpp"

#if defined(SELBP_BFLOAT16_PRODUCTS) && defined(__AVX512F__)
#define SELBP_BFLOAT16_KERNEL
#endif

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr std::int64_t kTerms = 128;  // of two strips: 64 KiB in float32, read from L1 and L2

// How a term of one row meets a vector of other rows' terms.
template <typename T>
struct Plain {
  using Term = T;
  using Sum = T;
  SELBP_INLINE static typename Simd<T>::V add(const T* factor, typename Simd<T>::V values, typename Simd<T>::V sum) {
    return fma(splat(*factor), values, sum);
  }
};

#ifdef SELBP_BFLOAT16_KERNEL
// Two bfloat16 terms in the place of one float: their exact products join a float32 sum one after the other.
struct Pairs {
  using Term = float;
  using Sum = float;
  SELBP_INLINE static F32 add(const float* factor, F32 values, F32 sum) {
    // In assembly: an intrinsic would need the instruction's own target in every function around it. The factor comes
    // in a register, which four sums share: a load for each would take longer than the products.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(values), "v"(splat(*factor)));
    return sum;
  }
};
#endif

// kRows x kVectors vectors of block[i, j] (+)= sum_k left[k, i] right[k, j], all sums in registers.
template <class Product, bool kAdd, int kRows, int kVectors>
SELBP_INLINE void multiply_tile(typename Product::Sum* block, const typename Product::Term* left,
                                const typename Product::Term* right, std::int64_t terms) {
  using T = typename Product::Sum;
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V sums[kRows][kVectors] = {};
  for (std::int64_t k = 0; k < terms; ++k) {
    // Without the pragmas GCC keeps `sums` in memory: three times slower.
#pragma GCC unroll 16
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kVectors; ++b)
        sums[a][b] = Product::add(left + k * kBlock + a, load(right + k * kBlock + b * kLanes), sums[a][b]);
  }
#pragma GCC unroll 16
  for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
    for (int b = 0; b < kVectors; ++b) {
      T* place = block + a * kBlock + b * kLanes;
      store(place, kAdd ? load(place) + sums[a][b] : sums[a][b]);
    }
}

// One stretch of terms of a whole block or, on the diagonal, of the tiles that its lower triangle touches.
template <class Product, bool kAdd>
void multiply_stretch(typename Product::Sum* block, const typename Product::Term* left,
                      const typename Product::Term* right, std::int64_t terms, bool diagonal) {
  constexpr int kLanes = Simd<typename Product::Sum>::kLanes, kVectors = kVectorBytes == 64 ? 4 : 2, kRows = 4;
  constexpr int kTall = kVectorBytes == 64 ? 16 : 8;  // rows of a tile one vector wide
  if (diagonal) {
    for (std::int64_t i = 0; i < kBlock; i += kTall)
      for (std::int64_t j = 0; j < i + kTall; j += kLanes)
        multiply_tile<Product, kAdd, kTall, 1>(block + i * kBlock + j, left + i, right + j, terms);
    return;
  }
  for (std::int64_t j = 0; j < kBlock; j += kVectors * kLanes)
    for (std::int64_t i = 0; i < kBlock; i += kRows)
      multiply_tile<Product, kAdd, kRows, kVectors>(block + i * kBlock + j, left + i, right + j, terms);
}

// The product of two strips; summing stretch by stretch also keeps the rounding error of many terms low.
template <class Product>
void multiply(typename Product::Sum* block, const typename Product::Term* left, const typename Product::Term* right,
              std::int64_t terms, bool diagonal) {
  multiply_stretch<Product, false>(block, left, right, least(kTerms, terms), diagonal);
  for (std::int64_t k = kTerms; k < terms; k += kTerms)
    multiply_stretch<Product, true>(block, left + k * kBlock, right + k * kBlock, least(kTerms, terms - k), diagonal);
}

// The block at (i0, j0), i0 >= j0, and its mirror image; r and h are packed. Whether its part of the diagonal is
// finite.
template <class Product, typename T = typename Product::Sum>
bool write_block(T* out, const typename Product::Term* r, const typename Product::Term* h, GramShape shape, T bias,
                 std::int64_t i0, std::int64_t j0) {
  const std::int64_t n = shape.n, i_count = least(kBlock, n - i0), j_count = least(kBlock, n - j0);
  const bool diagonal = i0 == j0;
  T* direct = out + i0 * n + j0;
  T* mirror = out + j0 * n + i0;
  alignas(64) T block[kBlock * kBlock], other[kBlock * kBlock];
  multiply<Product>(block, r + i0 * shape.classes, r + j0 * shape.classes, shape.classes, diagonal);
  multiply<Product>(other, h + i0 * shape.features, h + j0 * shape.features, shape.features, diagonal);
  for (std::int64_t i = 0; i < i_count; ++i) {
    const std::int64_t end = diagonal ? i + 1 : kBlock;
    for (std::int64_t j = 0; j < end; ++j) block[i * kBlock + j] *= other[i * kBlock + j] + bias;
    prefetch_row(direct + i * n);
    prefetch_row(mirror + least(i, j_count - 1) * n);
  }
  bool finite = true;
  if (diagonal) {
    for (std::int64_t i = 0; i < i_count; ++i) {
      finite = finite && block[i * kBlock + i] - block[i * kBlock + i] == 0;
      for (std::int64_t j = i + 1; j < j_count; ++j) block[i * kBlock + j] = block[j * kBlock + i];
    }
  }
  write_rows(direct, n, block, i_count, j_count);
  if (diagonal) return finite;
  transpose(other, block, kBlock, i_count, j_count);
  write_rows(mirror, n, other, j_count, i_count);
  return finite;
}

template <class Product, typename T = typename Product::Sum>
bool gram_of(T* out, typename Product::Term* packed, const typename Product::Term* r, const typename Product::Term* h,
             GramShape shape, T bias, int n_threads) {
  const std::int64_t blocks = (shape.n + kBlock - 1) / kBlock;
  typename Product::Term* packed_h = packed + blocks * kBlock * shape.classes;
  pack(packed, r, shape.n, shape.classes, n_threads);
  pack(packed_h, h, shape.n, shape.features, n_threads);
  AllOf finite;
  parallel_for(blocks * blocks, n_threads, 1, [&](std::int64_t place) {
    const std::int64_t i = place / blocks, j = place % blocks;
    if (j <= i && !write_block<Product>(out, packed, packed_h, shape, bias, i * kBlock, j * kBlock)) finite.lower();
  });
  return finite.held();
}

// totals[a][b] = sum_k left[a][k] right[k, lanes of b], stretch by stretch as `multiply` sums.
template <class T, int kRows, int kVectors>
SELBP_INLINE void multiply_rows(typename Simd<T>::V (&totals)[kRows][kVectors], const T* const (&left)[kRows],
                                const T* right, std::int64_t terms) {
  for (std::int64_t first = 0; first == 0 || first < terms; first += kTerms) {
    typename Simd<T>::V sums[kRows][kVectors] = {};
    const std::int64_t end = least(first + kTerms, terms);
    for (std::int64_t k = first; k < end; ++k) {
#pragma GCC unroll 4
      for (int b = 0; b < kVectors; ++b) {
        auto values = load(right + k * kBlock + b * Simd<T>::kLanes);
        if (kRows > 1) values = held(values);
#pragma GCC unroll 2
        for (int a = 0; a < kRows; ++a) sums[a][b] = fma(splat(left[a][k]), values, sums[a][b]);
      }
    }
#pragma GCC unroll 2
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kVectors; ++b) totals[a][b] = first ? totals[a][b] + sums[a][b] : sums[a][b];
  }
}

template <class T, int kRows>
void form_rows(T* out, const GramRows<T>& of, const std::int64_t (&rows)[kRows]) {
  constexpr int kLanes = Simd<T>::kLanes, kVectors = 4, kWidth = kVectors * kLanes;
  const std::int64_t n = of.shape.n, classes = of.shape.classes, features = of.shape.features;
  const T* packed_h = of.packed + (n + kBlock - 1) / kBlock * kBlock * classes;
  const T *r[kRows], *h[kRows];
  for (int a = 0; a < kRows; ++a) {
    r[a] = of.r + rows[a] * classes;
    h[a] = of.h + rows[a] * features;
  }
  for (std::int64_t column = 0; column < n; column += kWidth) {
    const std::int64_t strip = column / kBlock * kBlock, inside = column - strip;
    typename Simd<T>::V by_class[kRows][kVectors] = {}, by_feature[kRows][kVectors] = {};
    multiply_rows<T, kRows, kVectors>(by_class, r, of.packed + strip * classes + inside, classes);
    multiply_rows<T, kRows, kVectors>(by_feature, h, packed_h + strip * features + inside, features);
    for (int a = 0; a < kRows; ++a) {
      T* place = out + rows[a] * n + column;
      alignas(64) T part[kWidth];
      T* const to = column + kWidth <= n ? place : part;
      for (int b = 0; b < kVectors; ++b) store(to + b * kLanes, by_class[a][b] * (by_feature[a][b] + of.bias));
      if (to == part) __builtin_memcpy(place, part, static_cast<std::size_t>(n - column) * sizeof(T));
    }
  }
}

template <class T>
void form_two(T* out, const GramRows<T>& of, std::int64_t row, std::int64_t other) {
  if (other < 0)
    form_rows<T, 1>(out, of, {row});
  else
    form_rows<T, 2>(out, of, {row, other});
}

// The sums of squares of kBlock rows, in the order of `multiply`.
template <class T>
SELBP_INLINE void strip_squares(T* squares, const T* strip, std::int64_t terms) {
  constexpr int kLanes = Simd<T>::kLanes, kVectors = 4;
  for (std::int64_t i = 0; i < kBlock; i += kVectors * kLanes) {
    typename Simd<T>::V totals[kVectors] = {};
    for (std::int64_t first = 0; first < terms; first += kTerms) {
      typename Simd<T>::V sums[kVectors] = {};
      const std::int64_t end = least(first + kTerms, terms);
      for (std::int64_t k = first; k < end; ++k) {
#pragma GCC unroll 4
        for (int b = 0; b < kVectors; ++b) {
          const auto x = load(strip + k * kBlock + i + b * kLanes);
          sums[b] = fma(x, x, sums[b]);
        }
      }
#pragma GCC unroll 4
      for (int b = 0; b < kVectors; ++b) totals[b] = first ? totals[b] + sums[b] : sums[b];
    }
    for (int b = 0; b < kVectors; ++b) store(squares + i + b * kLanes, totals[b]);
  }
}

template <class T>
bool diagonal_of(T* out, const GramRows<T>& of, T* packed) {
  const auto [n, classes, features] = of.shape;
  const std::int64_t blocks = (n + kBlock - 1) / kBlock;
  T* packed_h = packed + blocks * kBlock * classes;
  pack(packed, of.r, n, classes, 1);
  pack(packed_h, of.h, n, features, 1);
  constexpr T kLarge = (sizeof(T) == sizeof(float) ? T(__FLT_MAX__) : T(__DBL_MAX__)) / 2;
  bool finite = true;
  for (std::int64_t first = 0; first < n; first += kBlock) {
    T r_sq[kBlock], h_sq[kBlock];
    strip_squares(r_sq, packed + first * classes, classes);
    strip_squares(h_sq, packed_h + first * features, features);
    for (std::int64_t i = 0; i < least(kBlock, n - first); ++i) {
      const T square = r_sq[i] * (h_sq[i] + of.bias);
      out[(first + i) * (n + 1)] = square;
      finite = finite && square <= kLarge;
    }
  }
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
  parallel_for(rows, n_threads, 0, [&](std::int64_t i) { sums[i] = dot(a + i * columns, b + i * columns, columns); });
}

}  // namespace

bool gram_f32(float* out, float* packed, const float* r, const float* h, GramShape shape, float bias, int n_threads) {
  return gram_of<Plain<float>>(out, packed, r, h, shape, bias, n_threads);
}
bool gram_f64(double* out, double* packed, const double* r, const double* h, GramShape shape, double bias,
              int n_threads) {
  return gram_of<Plain<double>>(out, packed, r, h, shape, bias, n_threads);
}
#ifdef SELBP_BFLOAT16_KERNEL
bool gram_bf16(float* out, float* packed, const float* r, const float* h, GramShape shape, float bias, int n_threads) {
  return gram_of<Pairs>(out, packed, r, h, shape, bias, n_threads);
}
#endif
bool gram_diagonal_f32(float* out, const GramRows<float>& of, float* packed) { return diagonal_of(out, of, packed); }
bool gram_diagonal_f64(double* out, const GramRows<double>& of, double* packed) { return diagonal_of(out, of, packed); }
void gram_rows_f32(float* out, const GramRows<float>& of, std::int64_t row, std::int64_t other) {
  form_two(out, of, row, other);
}
void gram_rows_f64(double* out, const GramRows<double>& of, std::int64_t row, std::int64_t other) {
  form_two(out, of, row, other);
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
