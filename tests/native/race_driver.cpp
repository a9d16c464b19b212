// Every kernel of the CPU core from several threads at once, for ThreadSanitizer: what the kernels share between calls.
//
// Built without OpenMP, whose runtime the sanitizer cannot see into: each call is serial, the threads are std::thread.
// Inputs are shared, outputs are each thread's own, and all threads must find the same. See scripts/sanitize.sh.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "choose_rows/cpu.hpp"
#include "cube/cpu.hpp"
#include "gram/cpu.hpp"
#include "matching/cpu.hpp"
#include "mean_gradient/cpu.hpp"
#include "statistics/cpu.hpp"

namespace {

constexpr std::int64_t kRows = 37, kClasses = 21, kWidth = 19, kKept = 9;

template <class T>
std::vector<T> numbers(std::int64_t count, unsigned seed) {
  std::vector<T> out(static_cast<std::size_t>(count));
  std::uint64_t state = seed;
  for (T& x : out) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = static_cast<T>(static_cast<double>(state >> 40) / (1 << 23) - 1.0);
  }
  return out;
}

struct Inputs {
  std::vector<float> logits = numbers<float>(kRows * kClasses, 1), features = numbers<float>(kRows * kWidth, 2),
                     weight = numbers<float>(kClasses * kWidth, 3);
  std::vector<double> wide = numbers<double>(kRows * kClasses, 4), draws = numbers<double>(kRows + 1, 5),
                      history = numbers<double>(50, 6);
  std::vector<std::int64_t> target, order;
  std::vector<unsigned char> valid;
  Inputs() : valid(kRows, 1) {
    for (std::int64_t i = 0; i < kRows; ++i) target.push_back(i % 5 ? i % kClasses : -100), order.push_back(i);
    for (double& x : draws) x = std::fabs(x) * 0.999;
  }
};

template <class T, class Solve>
double match(Solve solve, const std::vector<T>& gram) {
  using namespace selbp::matching;
  std::vector<T> inner(kRows, 0), weights(kKept);
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t j = 0; j < kRows; ++j) inner[i] += gram[i * kRows + j] / kRows;
  T target_sq = 0, residual = 0, sum = 0;
  for (T b : inner) target_sq += b / kRows;
  std::vector<std::int64_t> indices(kKept);
  std::int32_t count = 0;
  unsigned char status = 0;
  const Options options{int(kRows), int(kKept), Rule(0), true, 1e-3, 0.0};
  const Problem<T> problem{gram.data(), inner.data(), &target_sq, nullptr};
  const Answer<T> answer{indices.data(), weights.data(), &count, &residual, &status};
  if (!solve(options, problem, answer, 1, 1)) std::abort();
  for (T w : weights) sum += w;
  return sum + residual;
}

double once(const Inputs& in) {
  using namespace selbp;
  double total = 0;
  std::vector<float> loss(kRows), lse(kRows), squares(kRows), widths(kRows), p_rest(kRows), r(kRows * kClasses);
  bool correct[kRows], valid[kRows];
  const Matrix z{in.logits.data(), Type::f32, kClasses, kRows, kClasses};
  const Matrix h{in.features.data(), Type::f32, kWidth, kRows, kWidth};
  const Matrix w{in.weight.data(), Type::f32, kWidth, kClasses, kWidth};
  const StatisticsOutput out{loss.data(), lse.data(), squares.data(), widths.data(), p_rest.data(), correct, valid};
  for (const double smoothing : {0.0, 0.1}) {
    const LossOptions options{in.target.data(), nullptr, -100, smoothing, smoothing * 50};
    if (SELBP_PICK(statistics)(z, 0, kClasses, h, true, options, nullptr, out, 1) >= 0) std::abort();
    const ResidualTile tile{0, kClasses, double(kClasses), lse.data(), nullptr, nullptr};
    if (SELBP_PICK(residual)(z, tile, options, r.data(), 1) >= 0) std::abort();
    for (float x : r) total += std::fabs(x);
    for (float x : loss) total += x;
  }
  std::vector<float> scratch(head_scratch(kClasses, kWidth));
  const LossOptions plain{in.target.data(), nullptr, -100, 0.0, 0.0};
  if (SELBP_PICK(head_statistics)(h, w, nullptr, plain, out, scratch.data()) >= 0) std::abort();
  for (float x : loss) total += x;

  constexpr std::int64_t kPadded = (kRows + 63) / 64 * 64;
  std::vector<float> gram(kRows * kRows), packed(kPadded * (kClasses + kWidth));
  std::vector<double> wide_gram(kRows * kRows), wide_packed(kPadded * 2 * kClasses), sums(kRows);
  SELBP_PICK(gram_f32)
  (gram.data(), packed.data(), r.data(), in.features.data(), {kRows, kClasses, kWidth}, 1.0f, 1);
  SELBP_PICK(gram_f64)
  (wide_gram.data(), wide_packed.data(), in.wide.data(), in.wide.data(), {kRows, kClasses, kClasses}, 1.0, 1);
  SELBP_PICK(row_dots_f64)(sums.data(), in.wide.data(), in.wide.data(), kRows, kClasses, 1);
  total += match<float>(SELBP_PICK(match_f32), gram) + match<double>(SELBP_PICK(match_f64), wide_gram) + sums[3];

  std::vector<double> probability(kRows, double(kKept) / kRows), x(in.wide.begin(), in.wide.begin() + 3 * kRows);
  std::vector<double> room(5 * 6), found(kKept), work(7 * kRows), next(50), share(kRows), ranks(200);
  std::vector<std::int64_t> group(10), indices(kKept);
  if (SELBP_PICK(cube)(
          {kRows, 3, x.data(), probability.data(), in.order.data(), in.draws.data(), room.data(), group.data()}) >= 0)
    std::abort();
  for (const int rule : {0, 1, 2}) {
    SELBP_PICK(choose_rows)
    ({kRows, kKept, in.wide.data(), in.valid.data(), rule ? in.draws.data() : nullptr, ChooseRule(rule),
      SlotWeights(rule ? 2 : 0), indices.data(), found.data(), work.data()});
    for (const std::int64_t i : indices) total += double(i);
  }
  SELBP_PICK(percentile)({kRows, 50, in.wide.data(), in.history.data(), next.data(), share.data(), ranks.data()});
  std::vector<float> inner(kRows), head(kClasses * kWidth), head_bias(kClasses);
  float target_sq = 0;
  if (!SELBP_PICK(mean_gradient_f32)({r.data(), in.features.data(), kRows, kClasses, kWidth, true},
                                     {inner.data(), &target_sq, head.data(), head_bias.data()}, 1))
    std::abort();
  std::vector<double> weights(kKept, 1.0 / kKept);
  std::vector<double> scratch_sq(std::size_t(residual_scratch(kKept, kClasses, kClasses)));
  double norms[2];
  SELBP_PICK(matching_residual)
  ({in.wide.data(), in.wide.data(), kRows, kClasses, kClasses, true}, {indices.data(), weights.data(), kKept}, norms,
   scratch_sq.data());
  return total + share[5] + probability[2] + inner[4] + target_sq + norms[0] + norms[1];
}

}  // namespace

int main() {
  constexpr int kThreads = 4, kTimes = 50;
  const Inputs in;
  double totals[kThreads] = {};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t)
    threads.emplace_back([&in, &totals, t] {
      for (int i = 0; i < kTimes; ++i) totals[t] += once(in);
    });
  for (std::thread& thread : threads) thread.join();
  for (const double total : totals) {
    if (total == totals[0] && std::isfinite(total)) continue;
    std::printf("threads differ: %.17g and %.17g\n", total, totals[0]);
    return 1;
  }
  std::printf("%d threads, %d times every kernel: no race\n", kThreads, kTimes);
}
