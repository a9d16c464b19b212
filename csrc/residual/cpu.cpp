// The residual for one x86-64 level; see statistics/cpu.hpp for the quantities.
#include "statistics/rows.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

// r = (T p - t) D of one row into `out`; false, with junk in `out`, where the loss is not finite.
template <class T, bool kSmooth, bool kCap>
bool residual_row(const T* z, int64_t columns, int64_t y, const Compute<T>* weight, double weight_sum,
                  const LossOptions& options, double lse, Compute<T>* out) {
  using A = Compute<T>;
  using S = Simd<A>;
  using V = typename S::V;
  const double w_y = weight ? static_cast<double>(weight[y]) : 1.0;
  const double each = options.label_smoothing / static_cast<double>(columns);
  const double total = (1 - options.label_smoothing) * w_y + each * weight_sum;
  const double rest = each * (weight_sum - w_y);
  double derivative_y = 1;
  const double z_y = kCap ? cap_one(z[y], options.softcap, &derivative_y) : widen(z[y]);
  if (!__builtin_isfinite(lse) || !(__builtin_isfinite(z_y) || w_y == 0)) return false;

  const V lse_v = splat(A(lse)), total_v = splat(A(total)), each_v = splat(A(each)), cap = splat(A(options.softcap));
  const V zero{};
  double others = 0;
  V bad{};  // NaN once a class of nonzero weight has a logit that is not finite
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t length = columns - start < kBlock ? columns - start : kBlock;
    V part{};
    const auto one = [&](V v, V w, V& p) SELBP_LAMBDA {
      V derivative{};
      if (kCap) v = soft_cap<A>(v, cap, derivative);
      p = exp<A>(v - lse_v);
      V r = total_v * p;
      if (kSmooth) {
        r = fma(-each_v, w, r);
        bad += w == zero ? zero : v - v;
      }
      return kCap ? r * derivative : r;
    };
    for_each_chunk<S::kLanes>(
        length, y - start,
        [&](int64_t c) SELBP_LAMBDA {
          V p;
          store(out + start + c,
                one(load(z + start + c), kSmooth && weight ? load(weight + start + c) : splat(A(1)), p));
          part += p;
        },
        [&](int64_t c, int64_t count, int64_t skip) SELBP_LAMBDA {
          const Edge<T> edge(z + start, length, c, count, skip);
          V w = splat(A(1)), p;
          if (kSmooth && weight) w = Edge<A>(weight + start, length, c, count, skip).v;
          const V r = one(edge.v, w, p);
          part += edge.present ? p : zero;
          if (length >= S::kLanes) {
            store(out + start + edge.start, r);  // writes anew, the same, what an overlapped chunk wrote
          } else {
            for (int64_t lane = 0; lane < count; ++lane) out[start + c + lane] = r[lane];
          }
        });
    others += sum<A>(part);
  }
  if (!__builtin_isfinite(others) || (kSmooth && sum<A>(bad) != 0)) return false;
  out[y] = A((rest - total * others) * derivative_y);
  return true;
}

template <class T, bool kSmooth, bool kCap>
void run_residual(const Matrix& logits, const void* lse, const LossOptions& options, void* output, int n_threads) {
  using A = Compute<T>;
  const A* weight = static_cast<const A*>(options.class_weight);
  double weight_sum = static_cast<double>(logits.columns);
  if (kSmooth && weight) {
    weight_sum = 0;
    for (int64_t c = 0; c < logits.columns; ++c) weight_sum += static_cast<double>(weight[c]);
  }
#pragma omp parallel for num_threads(n_threads) if (n_threads > 1) schedule(static)
  for (int64_t row = 0; row < logits.rows; ++row) {
    const T* z = static_cast<const T*>(logits.data) + row * logits.row_stride;
    A* out = static_cast<A*>(output) + row * logits.columns;
    const int64_t y = options.target[row];
    const double l = static_cast<double>(static_cast<const A*>(lse)[row]);
    if (y == options.ignore_index ||
        !residual_row<T, kSmooth, kCap>(z, logits.columns, y, weight, weight_sum, options, l, out))
      __builtin_memset(out, 0, sizeof(A) * static_cast<size_t>(logits.columns));
  }
}

struct ResidualBody {
  const Matrix& logits;
  const void* lse;
  const LossOptions& options;
  void* output;
  int n_threads;
  template <class T, bool kSmooth, bool kCap>
  void run() const {
    run_residual<T, kSmooth, kCap>(logits, lse, options, output, n_threads);
  }
};

}  // namespace

int64_t residual(const Matrix& logits, const void* lse, const LossOptions& options, void* output, int n_threads) {
  const int64_t bad = first_bad_target(options, logits.rows, logits.columns);
  if (bad >= 0) return bad;
  dispatch(logits.type, options, ResidualBody{logits, lse, options, output, n_threads});
  return -1;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
