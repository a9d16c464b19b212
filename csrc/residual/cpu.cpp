// The residual for one x86-64 level; see statistics/cpu.hpp for the quantities.
#include "cpu/parallel.hpp"
#include "statistics/rows.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

// What one row needs beyond its logits.
struct RowTerms {
  double lse, scale;
  double total, rest;  // T, and the soft target's sum over the classes other than the target
  double p_rest;       // their probability, or NaN where it is to be summed (the tile is then the whole row)
};

// r = scale (T p - t) D of one row's tile into `out`, which may be `z` itself; false, with junk in `out`, where the
// loss turns out not to be finite. The target stands in column y (outside the tile: elsewhere).
template <class T, bool kSmooth, bool kCap>
bool residual_row(const T* z, int64_t columns, int64_t y, const Compute<T>* weight, double smooth_each, double softcap,
                  const RowTerms& row, Compute<T>* out) {
  using A = Compute<T>;
  using S = Simd<A>;
  using V = typename S::V;
  const bool held = y >= 0 && y < columns;
  double derivative_y = 1;
  double z_y = 0;
  if (held) z_y = kCap ? cap_one(z[y], softcap, &derivative_y) : widen(z[y]);
  const bool weighs_y = row.total != row.rest;
  if (!__builtin_isfinite(row.lse) || (weighs_y && !__builtin_isfinite(z_y))) return false;

  const V lse = splat(A(row.lse)), total = splat(A(row.total * row.scale)), each = splat(A(smooth_each * row.scale));
  const V cap = splat(A(softcap)), zero{};
  double p_rest = 0;
  V bad{};  // NaN once a class of nonzero weight has a logit that is not finite
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t length = columns - start < kBlock ? columns - start : kBlock;
    V part{};
    const auto one = [&](V v, V w, V& p) SELBP_LAMBDA {
      V derivative{};
      if (kCap) v = soft_cap<A>(v, cap, derivative);
      p = exp<A>(v - lse);
      V r = total * p;
      if (kSmooth) {
        r = fma(-each, w, r);
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
          // In place, lanes that overlap the chunk before hold residuals, not logits: masked, and not stored.
          const V r = one(edge.present ? edge.v : lse, edge.present ? w : zero, p);
          part += edge.present ? p : zero;
          A lanes[S::kLanes];
          store(lanes, r);
          const int64_t first = c - edge.start;
          for (int64_t lane = 0; lane < count; ++lane) out[start + c + lane] = lanes[first + lane];
        });
    p_rest += sum<A>(part);
  }
  if (!__builtin_isfinite(p_rest) || (kSmooth && sum<A>(bad) != 0)) return false;
  if (row.p_rest == row.p_rest) p_rest = row.p_rest;
  if (held) out[y] = A(row.scale * (row.rest - row.total * p_rest) * derivative_y);
  return true;
}

template <class T, bool kSmooth, bool kCap>
void run_residual(const Matrix& logits, const ResidualTile& tile, const LossOptions& options, void* output,
                  int n_threads) {
  using A = Compute<T>;
  const A* weight = static_cast<const A*>(options.class_weight);
  const double smooth_each = options.label_smoothing / static_cast<double>(tile.n_classes);
  parallel_for(logits.rows, n_threads, 0, [&](int64_t row) {
    const T* z = static_cast<const T*>(logits.data) + row * logits.row_stride;
    A* out = static_cast<A*>(output) + row * logits.columns;
    const int64_t y = options.target[row];
    bool finite = y != options.ignore_index;
    if (finite) {
      const double w_y = weight ? static_cast<double>(weight[y]) : 1.0;
      const double rest = smooth_each * (tile.weight_sum - w_y);
      const double total = (1 - options.label_smoothing) * w_y + smooth_each * w_y + rest;
      const RowTerms terms{
          static_cast<double>(static_cast<const A*>(tile.lse)[row]),
          tile.scale ? static_cast<double>(static_cast<const A*>(tile.scale)[row]) : 1.0, total, rest,
          tile.p_rest ? static_cast<double>(static_cast<const A*>(tile.p_rest)[row]) : __builtin_nan("")};
      finite = residual_row<T, kSmooth, kCap>(z, logits.columns, y - tile.first_class,
                                              weight ? weight + tile.first_class : nullptr, smooth_each,
                                              options.softcap, terms, out);
    }
    if (!finite) __builtin_memset(out, 0, sizeof(A) * static_cast<std::size_t>(logits.columns));
  });
}

struct ResidualBody {
  const Matrix& logits;
  const ResidualTile& tile;
  const LossOptions& options;
  void* output;
  int n_threads;
  template <class T, bool kSmooth, bool kCap>
  void run() const {
    run_residual<T, kSmooth, kCap>(logits, tile, options, output, n_threads);
  }
};

}  // namespace

int64_t residual(const Matrix& logits, const ResidualTile& tile, const LossOptions& options, void* output,
                 int n_threads) {
  const int64_t bad = first_bad_target(options, logits.rows, tile.n_classes);
  if (bad >= 0) return bad;
  dispatch(logits.type, options, ResidualBody{logits, tile, options, output, n_threads});
  return -1;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
