// The mean gradient of factors that the cache holds, for one SIMD level.
#include "mean_gradient/cpu.hpp"

#include "cpu/parallel.hpp"
#include "cpu/simd.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

// A weighted sum of rows for each class: out[c, :] (-)= sum_i coefficient[i, c] rows[at(i), :] / divisor.
template <class T>
struct Combination {
  const T* coefficients;   // (count, classes)
  const T* rows;           // (.., width)
  const std::int64_t* at;  // (count,) which row; null: row i
  std::int64_t count, classes, width;
  T divisor;
};

// kClasses classes, and kVectors vectors of columns from `column` on; the sums stay in registers.
template <class T, int kClasses, int kVectors>
SELBP_INLINE void combine_tile(T* out, const Combination<T>& of, std::int64_t first_class, std::int64_t column) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V sums[kClasses][kVectors] = {};
  for (std::int64_t i = 0; i < of.count; ++i) {
    const T* row = of.rows + (of.at ? of.at[i] : i) * of.width + column;
    const T* coefficient = of.coefficients + i * of.classes + first_class;
#pragma GCC unroll 2
    for (int b = 0; b < kVectors; ++b) {
      const auto values = load(row + b * kLanes);
#pragma GCC unroll 10
      for (int a = 0; a < kClasses; ++a) sums[a][b] = fma(splat(coefficient[a]), values, sums[a][b]);
    }
  }
#pragma GCC unroll 10
  for (int a = 0; a < kClasses; ++a)
#pragma GCC unroll 2
    for (int b = 0; b < kVectors; ++b)
      store(out + (first_class + a) * of.width + column + b * kLanes, sums[a][b] / of.divisor);
}

// All columns of kClasses classes. What is left of a row is covered by a vector that ends with it.
template <class T, int kClasses>
void combine_classes(T* out, const Combination<T>& of, std::int64_t first_class) {
  constexpr std::int64_t kLanes = Simd<T>::kLanes;
  std::int64_t column = 0;
  for (; column + 2 * kLanes <= of.width; column += 2 * kLanes)
    combine_tile<T, kClasses, 2>(out, of, first_class, column);
  for (; column < of.width && of.width >= kLanes; column += kLanes) {
    if (column + kLanes > of.width) column = of.width - kLanes;
    combine_tile<T, kClasses, 1>(out, of, first_class, column);
  }
  for (; column < of.width; ++column) {
    for (std::int64_t c = first_class; c < first_class + kClasses; ++c) {
      T sum = 0;
      for (std::int64_t i = 0; i < of.count; ++i)
        sum += of.coefficients[i * of.classes + c] * of.rows[(of.at ? of.at[i] : i) * of.width + column];
      out[c * of.width + column] = sum / of.divisor;
    }
  }
}

template <class T>
void combine_part(T* out, const Combination<T>& of, std::int64_t first, std::int64_t last) {
  switch (last - first) {
    case 1: return combine_classes<T, 1>(out, of, first);
    case 2: return combine_classes<T, 2>(out, of, first);
    case 3: return combine_classes<T, 3>(out, of, first);
    case 4: return combine_classes<T, 4>(out, of, first);
    case 5: return combine_classes<T, 5>(out, of, first);
    case 6: return combine_classes<T, 6>(out, of, first);
    case 7: return combine_classes<T, 7>(out, of, first);
    case 8: return combine_classes<T, 8>(out, of, first);
    case 9: return combine_classes<T, 9>(out, of, first);
    default: return combine_classes<T, 10>(out, of, first);
  }
}

template <class T>
void combine(T* out, const Combination<T>& of, int n_threads) {
  constexpr std::int64_t kMost = kVectorBytes == 64 ? 10 : 4;  // whose sums and factors fit in the registers
  const std::int64_t parts = (of.classes + kMost - 1) / kMost;
  parallel_for(parts, n_threads, 1, [&](std::int64_t part) {
    combine_part(out, of, of.classes * part / parts, of.classes * (part + 1) / parts);
  });
}

// Sums in double of vectors of T.
template <class T>
struct Doubles {
  static constexpr int kParts = int(sizeof(double) / sizeof(T));
  F64 part[kParts] = {};

  SELBP_INLINE void add(typename Simd<T>::V v) {
    if constexpr (kParts == 1) {
      part[0] += v;
    } else {
      F64 low, high;
      widen(v, low, high);
      part[0] += low;
      part[1] += high;
    }
  }
  SELBP_INLINE double total() const {
    F64 all = part[0];
    if constexpr (kParts == 2) all += part[1];
    return sum<double>(all);
  }
};

// r_i M in kVectors vectors of columns, times h_i: their sum, one for each of kRows rows. A function by itself:
// inlined, the sums would not all stay in registers.
template <class T, int kRows, int kVectors>
__attribute__((noinline)) void add_inner(Doubles<T> (&dots)[kRows], const GradientFactors<T>& of, const T* r,
                                         const T* h, const T* mean) {
  constexpr int kLanes = Simd<T>::kLanes;
  typename Simd<T>::V along[kRows][kVectors] = {};
  for (std::int64_t c = 0; c < of.classes; ++c) {
    const T* weights = mean + c * of.width;
#pragma GCC unroll 8
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
      for (int b = 0; b < kVectors; ++b)
        along[a][b] = fma(splat(r[a * of.classes + c]), load(weights + b * kLanes), along[a][b]);
  }
#pragma GCC unroll 8
  for (int a = 0; a < kRows; ++a) {
    auto products = along[a][0] * load(h + a * of.width);
#pragma GCC unroll 4
    for (int b = 1; b < kVectors; ++b) products = fma(along[a][b], load(h + a * of.width + b * kLanes), products);
    dots[a].add(products);
  }
}

// sums[i] = g_i . M over the weights, for kRows rows.
template <class T, int kRows>
SELBP_INLINE void inner_rows(double* sums, const GradientFactors<T>& of, const T* mean, std::int64_t first) {
  constexpr std::int64_t kLanes = Simd<T>::kLanes;
  const T *r = of.residual + first * of.classes, *h = of.features + first * of.width;
  constexpr int kWide = kVectorBytes == 64 ? 4 : 2;  // vectors whose sums fit in the registers
  Doubles<T> dots[kRows];
  std::int64_t column = 0;
  for (; column + kWide * kLanes <= of.width; column += kWide * kLanes)
    add_inner<T, kRows, kWide>(dots, of, r, h + column, mean + column);
  for (; column + kLanes <= of.width; column += kLanes) add_inner<T, kRows, 1>(dots, of, r, h + column, mean + column);
  for (int a = 0; a < kRows; ++a) {
    sums[a] = dots[a].total();
    for (std::int64_t rest = column; rest < of.width; ++rest) {
      T along = 0;
      for (std::int64_t c = 0; c < of.classes; ++c) along += r[a * of.classes + c] * mean[c * of.width + rest];
      sums[a] += static_cast<double>(along) * static_cast<double>(h[a * of.width + rest]);
    }
  }
}

// sums[i] = g_i . M, bias and all, for kRows rows.
template <class T, int kRows>
void inner_all(const GradientFactors<T>& of, const MeanGradientOutput<T>& out, std::int64_t first) {
  double sums[kRows];
  inner_rows<T, kRows>(sums, of, out.head_weight, first);
  for (int a = 0; a < kRows; ++a) {
    const T* r = of.residual + (first + a) * of.classes;
    for (std::int64_t c = 0; of.bias && c < of.classes; ++c)
      sums[a] += static_cast<double>(r[c]) * static_cast<double>(out.head_bias[c]);
    out.inner[first + a] = T(sums[a]);
  }
}

// The sum of squares in double, each product exact.
template <class T>
double square_sum(const T* p, std::int64_t count) {
  constexpr int kParts = 8;
  double parts[kParts] = {};
  std::int64_t i = 0;
  for (; i + kParts <= count; i += kParts)
    for (int l = 0; l < kParts; ++l) parts[l] += static_cast<double>(p[i + l]) * static_cast<double>(p[i + l]);
  for (; i < count; ++i) parts[0] += static_cast<double>(p[i]) * static_cast<double>(p[i]);
  double total = 0;
  for (int l = 0; l < kParts; ++l) total += parts[l];
  return total;
}

// sums[c] = sum_i coefficient[i, first + c] in double, for up to kSums classes at a time.
constexpr std::int64_t kSums = 8;
template <class T>
std::int64_t class_sums(double (&sums)[kSums], const T* coefficients, std::int64_t count, std::int64_t classes,
                        std::int64_t first) {
  const std::int64_t held = classes - first < kSums ? classes - first : kSums;
  for (double& x : sums) x = 0;
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t c = 0; c < held; ++c) sums[c] += static_cast<double>(coefficients[i * classes + first + c]);
  return held;
}

template <class T>
bool mean_of(const GradientFactors<T>& of, const MeanGradientOutput<T>& out, int n_threads) {
  constexpr int kRows = 4;
  const std::int64_t n = of.n, classes = of.classes;
  const T divisor = T(n < 1 ? 1 : n);
  combine(out.head_weight, Combination<T>{of.residual, of.features, nullptr, n, classes, of.width, divisor}, n_threads);
  double target_sq = square_sum(out.head_weight, classes * of.width);
  if (of.bias) {
    double sums[kSums];
    for (std::int64_t first = 0; first < classes; first += kSums) {
      const std::int64_t held = class_sums(sums, of.residual, n, classes, first);
      for (std::int64_t c = 0; c < held; ++c) out.head_bias[first + c] = T(sums[c] / static_cast<double>(divisor));
    }
    target_sq += square_sum(out.head_bias, classes);
  }
  *out.target_sq = T(target_sq);
  parallel_for(n / kRows, n_threads, 0, [&](std::int64_t group) { inner_all<T, kRows>(of, out, group * kRows); });
  for (std::int64_t row = n / kRows * kRows; row < n; ++row) inner_all<T, 1>(of, out, row);
  return __builtin_isfinite(*out.target_sq);
}

}  // namespace

bool mean_gradient_f32(const GradientFactors<float>& factors, const MeanGradientOutput<float>& output, int n_threads) {
  return mean_of(factors, output, n_threads);
}
bool mean_gradient_f64(const GradientFactors<double>& factors, const MeanGradientOutput<double>& output,
                       int n_threads) {
  return mean_of(factors, output, n_threads);
}

void matching_residual(const GradientFactors<double>& of, const WeightedRows<double>& chosen, double* squares,
                       double* scratch) {
  const std::int64_t classes = of.classes, entries = classes * of.width;
  const double n = static_cast<double>(of.n < 1 ? 1 : of.n);
  double *const mean = scratch, *const taken = mean + entries, *const coefficients = taken + entries;
  auto* const rows = reinterpret_cast<std::int64_t*>(coefficients + chosen.k * classes);
  std::int64_t count = 0;
  for (std::int64_t j = 0; j < chosen.k; ++j) {
    if (chosen.indices[j] < 0) continue;
    rows[count] = chosen.indices[j];
    for (std::int64_t c = 0; c < classes; ++c)
      coefficients[count * classes + c] = chosen.weights[j] * of.residual[rows[count] * classes + c];
    ++count;
  }
  combine(mean, Combination<double>{of.residual, of.features, nullptr, of.n, classes, of.width, n}, 1);
  combine(taken, Combination<double>{coefficients, of.features, rows, count, classes, of.width, 1.0}, 1);
  squares[1] = square_sum(mean, entries);
  for (std::int64_t i = 0; i < entries; ++i) mean[i] -= taken[i];
  squares[0] = square_sum(mean, entries);
  for (std::int64_t first = 0; of.bias && first < classes; first += kSums) {
    double all[kSums], some[kSums];
    const std::int64_t held = class_sums(all, of.residual, of.n, classes, first);
    class_sums(some, coefficients, count, classes, first);
    for (std::int64_t c = 0; c < held; ++c) {
      squares[1] += all[c] / n * (all[c] / n);
      squares[0] += (all[c] / n - some[c]) * (all[c] / n - some[c]);
    }
  }
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
