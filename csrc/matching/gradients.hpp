// From the factors of a small minibatch's gradients to rows and weights: mean gradient, Gram matrix, match. Serial.
//
// Of the Gram matrix the solver reads the diagonal and the rows that it chooses. Where these are a small part, each is
// formed when it is chosen, together with the row that looks likeliest to come next: the pass over the packed factors
// is bound by reading them, so a second row costs little.
#pragma once

#include <cstdint>
#include <new>
#include <vector>

#include "gram/cpu.hpp"
#include "matching/cpu.hpp"
#include "mean_gradient/cpu.hpp"

namespace selbp {

// Memory that stays for the thread's next call, aligned to a cache line: fresh pages would cost a tenth of a selection.
template <typename T>
T* kept_scratch(std::size_t count) {
  constexpr std::size_t kLine = 64;
  static thread_local std::vector<unsigned char> memory;
  if (memory.size() < count * sizeof(T) + kLine) memory.resize(count * sizeof(T) + kLine);
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  return reinterpret_cast<T*>((begin + kLine - 1) / kLine * kLine);
}

struct GradientKernels {
  static bool mean(const GradientFactors<float>& factors, const MeanGradientOutput<float>& output, int n_threads) {
    return SELBP_PICK(mean_gradient_f32)(factors, output, n_threads);
  }
  static bool mean(const GradientFactors<double>& factors, const MeanGradientOutput<double>& output, int n_threads) {
    return SELBP_PICK(mean_gradient_f64)(factors, output, n_threads);
  }
  static bool gram(float* out, float* packed, const GramRows<float>& of) {
    return SELBP_PICK(gram_f32)(out, packed, of.r, of.h, of.shape, of.bias, 1);
  }
  static bool gram(double* out, double* packed, const GramRows<double>& of) {
    return SELBP_PICK(gram_f64)(out, packed, of.r, of.h, of.shape, of.bias, 1);
  }
  static bool diagonal(float* out, float* packed, const GramRows<float>& of) {
    return SELBP_PICK(gram_diagonal_f32)(out, of, packed);
  }
  static bool diagonal(double* out, double* packed, const GramRows<double>& of) {
    return SELBP_PICK(gram_diagonal_f64)(out, of, packed);
  }
  static double dot(const float* a, const float* b, std::int64_t count) {
    double sum;
    SELBP_PICK(row_dots_f32)(&sum, a, b, 1, count, 1);
    return sum;
  }
  static double dot(const double* a, const double* b, std::int64_t count) {
    double sum;
    SELBP_PICK(row_dots_f64)(&sum, a, b, 1, count, 1);
    return sum;
  }
  static void rows(float* out, const GramRows<float>& of, int row, int other) {
    SELBP_PICK(gram_rows_f32)(out, of, row, other);
  }
  static void rows(double* out, const GramRows<double>& of, int row, int other) {
    SELBP_PICK(gram_rows_f64)(out, of, row, other);
  }
  static bool match(const matching::Options& options, const matching::Problem<float>& problem,
                    const matching::Answer<float>& answer, const matching::RowSource* rows) {
    return rows ? SELBP_PICK(match_rows_f32)(options, problem, answer, *rows)
                : SELBP_PICK(match_f32)(options, problem, answer, 1, 1);
  }
  static bool match(const matching::Options& options, const matching::Problem<double>& problem,
                    const matching::Answer<double>& answer, const matching::RowSource* rows) {
    return rows ? SELBP_PICK(match_rows_f64)(options, problem, answer, *rows)
                : SELBP_PICK(match_f64)(options, problem, answer, 1, 1);
  }
};

// The rows of a Gram matrix as they are asked for.
template <typename T>
struct RowsOnDemand {
  const GramRows<T>& of;
  T* gram;
  unsigned char* formed;

  static void form(void* self, int row, int likely) {
    const auto& rows = *static_cast<RowsOnDemand*>(self);
    GradientKernels::rows(rows.gram, rows.of, row, likely);
    rows.formed[row] = 1;
    if (likely >= 0) rows.formed[likely] = 1;
  }

  // Whether the residuals point the same way, as the gradients then mostly do: a few of the numbers tell.
  static bool alike(void* self, int row, int other) {
    const auto& of = static_cast<RowsOnDemand*>(self)->of;
    return GradientKernels::dot(of.r + row * of.shape.classes, of.r + other * of.shape.classes, of.shape.classes) > 0;
  }
};

// False where a number is not finite: indices and weights are then unset.
template <typename T>
bool match_gradients(const GradientFactors<T>& factors, const matching::Options& options, const unsigned char* valid,
                     std::int64_t* indices, T* weights) {
  const std::int64_t n = factors.n, classes = factors.classes, width = factors.width;
  const std::int64_t strips = packed_count({n, classes, width}), rest = n * n + 2 * n + classes * (width + 1) + 1;
  T* const packed = kept_scratch<T>(static_cast<std::size_t>(strips + rest));
  T *const gram = packed + strips, *const inner = gram + n * n, *const target_sq = inner + n;
  T *const head_weight = target_sq + 1, *const head_bias = head_weight + classes * width;
  auto* const formed = reinterpret_cast<unsigned char*>(head_bias + classes);
  if (!GradientKernels::mean(factors, {inner, target_sq, head_weight, head_bias}, 1)) return false;

  const GramRows<T> of{factors.residual, factors.features, packed, {n, classes, width}, T(factors.bias ? 1 : 0)};
  RowsOnDemand<T> on_demand{of, gram, formed};
  const matching::RowSource source{RowsOnDemand<T>::form, RowsOnDemand<T>::alike, &on_demand, formed};
  const bool few = 3 * options.k <= n;
  for (std::int64_t row = 0; row < n; ++row) formed[row] = 0;
  if (!(few ? GradientKernels::diagonal(gram, packed, of) : GradientKernels::gram(gram, packed, of))) return false;

  std::int32_t count = 0;
  T residual = 0;
  unsigned char status = 0;
  const matching::Problem<T> problem{gram, inner, target_sq, valid};
  if (!GradientKernels::match(options, problem, {indices, weights, &count, &residual, &status},
                              few ? &source : nullptr))
    throw std::bad_alloc();
  return true;
}

}  // namespace selbp
