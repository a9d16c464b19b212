// What the CPU core's kernels give for fixed inputs, as text: the same on every machine, see scripts/test_aarch64.sh.
//
// A line is a name, the tolerance its numbers are held to (0: the same) and the numbers. Inputs are made by integer
// arithmetic and exact divisions alone, so that they are the same bits everywhere.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "choose_rows/cpu.hpp"
#include "cube/cpu.hpp"
#include "gram/cpu.hpp"
#include "matching/cpu.hpp"
#include "mean_gradient/cpu.hpp"
#include "statistics/cpu.hpp"

namespace {

using std::int64_t;
constexpr int64_t kRows = 37, kClasses = 21, kWidth = 19, kKept = 9;
constexpr int kThreads = 2;

template <class T>
std::vector<T> numbers(int64_t count, unsigned seed) {  // in [-1, 1), with 16 bits each: exact in both types
  std::vector<T> out(static_cast<std::size_t>(count));
  std::uint64_t state = seed;
  for (T& x : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = static_cast<T>(static_cast<double>(state >> 48) / (1 << 15) - 1.0);
  }
  return out;
}

template <class T>
void print(const std::string& name, double tolerance, const std::vector<T>& values) {
  std::printf("%s %g", name.c_str(), tolerance);
  for (const T& x : values) std::printf(" %.17g", static_cast<double>(x));
  std::printf("\n");
}

template <class T>
struct Kernels;
template <>
struct Kernels<float> {
  static constexpr double kTolerance = 4e-6;
  static constexpr selbp::Type kType = selbp::Type::f32;
  static constexpr auto gram = &selbp::baseline::gram_f32;
  static constexpr auto match = &selbp::baseline::match_f32;
  static constexpr auto row_dots = &selbp::baseline::row_dots_f32;
  static constexpr auto mean_gradient = &selbp::baseline::mean_gradient_f32;
};
template <>
struct Kernels<double> {
  static constexpr double kTolerance = 1e-12;
  static constexpr selbp::Type kType = selbp::Type::f64;
  static constexpr auto gram = &selbp::baseline::gram_f64;
  static constexpr auto match = &selbp::baseline::match_f64;
  static constexpr auto row_dots = &selbp::baseline::row_dots_f64;
  static constexpr auto mean_gradient = &selbp::baseline::mean_gradient_f64;
};

std::vector<int64_t> targets() {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < kRows; ++i) out.push_back(i % 5 ? i % kClasses : -100);
  return out;
}

template <class T>
void check_statistics(const std::string& type) {
  using namespace selbp;
  const std::vector<T> logits = numbers<T>(kRows * kClasses, 1), features = numbers<T>(kRows * kWidth, 2);
  const std::vector<int64_t> target = targets();
  const Matrix z{logits.data(), Kernels<T>::kType, kClasses, kRows, kClasses};
  const Matrix h{features.data(), Kernels<T>::kType, kWidth, kRows, kWidth};
  for (const bool options_on : {false, true}) {
    std::vector<T> loss(kRows), lse(kRows), squares(kRows), widths(kRows), p_rest(kRows), r(kRows * kClasses);
    bool correct[kRows], valid[kRows];
    const StatisticsOutput out{loss.data(), lse.data(), squares.data(), widths.data(), p_rest.data(), correct, valid};
    const LossOptions options{target.data(), nullptr, -100, options_on ? 0.1 : 0.0, options_on ? 5.0 : 0.0};
    if (baseline::statistics(z, 0, kClasses, h, true, options, nullptr, out, kThreads) >= 0) std::abort();
    const ResidualTile tile{0, kClasses, double(kClasses), lse.data(), p_rest.data(), nullptr};
    if (baseline::residual(z, tile, options, r.data(), kThreads) >= 0) std::abort();
    const std::string name = type + (options_on ? "-options-" : "-");
    const double tolerance = Kernels<T>::kTolerance;
    print("loss-" + name, tolerance, loss);
    print("lse-" + name, tolerance, lse);
    print("residual_sq-" + name, tolerance, squares);
    print("feature_sq-" + name, tolerance, widths);
    print("correct-" + name, 0, std::vector<int>(correct, correct + kRows));
    print("residual-" + name, tolerance, std::vector<T>(r.begin(), r.begin() + 3 * kClasses));
  }
}

template <class T>
void check_matching(const std::string& type) {
  using namespace selbp;
  const std::vector<T> r = numbers<T>(kRows * kClasses, 3), h = numbers<T>(kRows * kWidth, 4);
  std::vector<T> gram(kRows * kRows), packed(64 * (kClasses + kWidth));
  if (!Kernels<T>::gram(gram.data(), packed.data(), r.data(), h.data(), {kRows, kClasses, kWidth}, 1, kThreads))
    std::abort();
  print("gram-" + type, Kernels<T>::kTolerance, std::vector<T>(gram.begin(), gram.begin() + 3 * kRows));
  std::vector<double> dots(kRows);
  Kernels<T>::row_dots(dots.data(), r.data(), r.data(), kRows, kClasses, kThreads);
  print("row_dots-" + type, Kernels<T>::kTolerance, dots);

  std::vector<T> inner(kRows, 0);
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kRows; ++j) inner[i] += gram[i * kRows + j] / kRows;
  T target_sq = 0;
  for (const T b : inner) target_sq += b / kRows;
  for (const int rule : {0, 1, 2}) {
    for (const bool nonnegative : {false, true}) {
      std::vector<T> weights(kKept), residual(1);
      std::vector<int64_t> indices(kKept);
      std::int32_t count = 0;
      unsigned char status = 0;
      const matching::Options options{int(kRows), int(kKept), matching::Rule(rule), nonnegative, 1e-3, 0.0};
      const matching::Problem<T> problem{gram.data(), inner.data(), &target_sq, nullptr};
      const matching::Answer<T> answer{indices.data(), weights.data(), &count, residual.data(), &status};
      if (!Kernels<T>::match(options, problem, answer, 1, 1)) std::abort();
      const std::string name = type + "-" + std::to_string(rule) + (nonnegative ? "-nonnegative" : "");
      print("match_rows-" + name, 0, indices);
      print("match_weights-" + name, Kernels<T>::kTolerance, weights);
      print("match_residual-" + name, Kernels<T>::kTolerance, residual);
    }
  }
}

template <class T>
void check_mean_gradient(const std::string& type) {
  using namespace selbp;
  const std::vector<T> r = numbers<T>(kRows * kClasses, 9), h = numbers<T>(kRows * kWidth, 10);
  std::vector<T> inner(kRows), target_sq(1), weight(kClasses * kWidth), bias(kClasses);
  if (!Kernels<T>::mean_gradient({r.data(), h.data(), kRows, kClasses, kWidth, true},
                                 {inner.data(), target_sq.data(), weight.data(), bias.data()}, kThreads))
    std::abort();
  print("mean_inner-" + type, Kernels<T>::kTolerance, inner);
  print("mean_target_sq-" + type, Kernels<T>::kTolerance, target_sq);
  print("mean_weight-" + type, Kernels<T>::kTolerance, weight);
  print("mean_bias-" + type, Kernels<T>::kTolerance, bias);
}

void check_matching_residual() {
  using namespace selbp;
  const std::vector<double> r = numbers<double>(kRows * kClasses, 9), h = numbers<double>(kRows * kWidth, 10);
  std::vector<int64_t> indices;
  for (int64_t j = 0; j < kKept; ++j) indices.push_back(j == 4 ? -1 : 3 * j);
  const std::vector<double> weights = numbers<double>(kKept, 11);
  std::vector<double> squares(2), scratch(static_cast<std::size_t>(residual_scratch(kKept, kClasses, kWidth)));
  baseline::matching_residual({r.data(), h.data(), kRows, kClasses, kWidth, true},
                              {indices.data(), weights.data(), kKept}, squares.data(), scratch.data());
  print("matching_residual", 1e-12, squares);
}

void check_choices() {
  using namespace selbp;
  const std::vector<double> score = numbers<double>(kRows, 5);
  std::vector<double> draws = numbers<double>(kRows + 1, 6), scratch(7 * kRows), weights(kKept), loss = score;
  std::vector<unsigned char> valid(kRows, 1);
  std::vector<int64_t> indices(kKept), order, group(10);
  valid[3] = 0;
  for (double& x : draws) x = (x + 1) / 2;
  for (double& x : loss) x = x < 0 ? -x : x;
  for (const int rule : {0, 1, 2}) {
    baseline::choose_rows({kRows, kKept, loss.data(), valid.data(), rule ? draws.data() : nullptr, ChooseRule(rule),
                           SlotWeights(rule ? 2 : 0), indices.data(), weights.data(), scratch.data()});
    print("choose_rows-" + std::to_string(rule), 0, indices);
    print("choose_weights-" + std::to_string(rule), 1e-12, weights);
  }
  const std::vector<double> history = numbers<double>(50, 7), x = numbers<double>(3 * kRows, 8);
  std::vector<double> next(50), share(kRows), ranks(200), room(30), probability(kRows, double(kKept) / kRows);
  baseline::percentile({kRows, 50, loss.data(), history.data(), next.data(), share.data(), ranks.data()});
  print("percentile", 1e-12, share);
  for (int64_t i = 0; i < kRows; ++i) order.push_back(i);
  if (baseline::cube({kRows, 3, x.data(), probability.data(), order.data(), draws.data(), room.data(), group.data()}) >=
      0)
    std::abort();
  print("cube", 0, probability);
}

}  // namespace

int main() {
  check_statistics<float>("f32");
  check_statistics<double>("f64");
  check_matching<float>("f32");
  check_matching<double>("f64");
  check_mean_gradient<float>("f32");
  check_mean_gradient<double>("f64");
  check_matching_residual();
  check_choices();
}
