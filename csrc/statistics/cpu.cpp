// The statistics for one x86-64 level; see cpu.hpp for the quantities.
#include "statistics/cpu.hpp"

#include "cpu/parallel.hpp"
#include "statistics/head.hpp"
#include "statistics/rows.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

// Joins to the row's fit that of other classes, given by its residual and sums relative to the slope `shift`:
// residual = ||E - shift V||^2, product = (E - shift V).V, square = V.V.
void join_fit(RowState& state, double shift, double residual, double product, double square) {
  const double slope = square > 0 ? product / square : 0.0;
  const double left = residual - slope * product;  // at its own best slope; cancels little where `shift` is near it
  state.s2 += left > 0 || left != left ? left : 0.0;
  const double total = state.square + square;
  if (total > 0) {
    const double delta = shift + slope - state.rho;
    state.s2 += delta * delta * (state.square * (square / total));
    state.rho += delta * (square / total);
    state.square = total;
  }
}

// Adds `columns` <= kBlock logits, the target at column y (outside them: none), to the row's state.
template <class T, bool kSmooth, bool kCap>
void add_block(const T* z, int64_t columns, int64_t y, const Compute<T>* weight, double softcap, RowState& state) {
  using A = Compute<T>;
  using S = Simd<A>;
  using V = typename S::V;
  const V lowest = splat(A(-kInfinity)), zero{};

  V top = lowest;
  for_each_chunk<S::kLanes>(
      columns, y, [&](int64_t c) SELBP_LAMBDA { top = maximum(load(z + c), top); },
      [&](int64_t c, int64_t count, int64_t skip) SELBP_LAMBDA {
        const Edge<T> edge(z, columns, c, count, skip);
        top = maximum(edge.present ? edge.v : lowest, top);
      });
  A block_m = greatest<A>(top);
  if (kCap) block_m = A(cap_one<A>(block_m, softcap));  // the cap is monotone

  if (static_cast<double>(block_m) > state.m) {  // rescale what came before to the new maximum
    if (state.s != 0) {
      const double factor = __builtin_exp(state.m - static_cast<double>(block_m));
      state.s *= factor;
      state.rho *= factor;
      state.s2 *= factor * factor;
    }
    if (state.amount != 0) state.spread += state.amount * (static_cast<double>(block_m) - state.m);
    state.m = static_cast<double>(block_m);
  }

  const V m = splat(state.m > -kInfinity ? A(state.m) : A(0));  // -inf - -inf would be NaN
  const V cap = splat(A(softcap));
  V s{}, s2{}, product{}, square{}, spread{}, amount{}, shift{};
  const auto add = [&](V v, V w, V derivative) SELBP_LAMBDA {
    V e = exp<A>(v - m);
    s += e;
    if (kCap) e *= derivative;
    if (kSmooth) {
      const V gap = w == zero ? zero : w * (m - v);  // 0 * inf counts as 0: a masked class of weight 0
      spread += gap;
      amount += w;
      if (kCap) w *= derivative;
      e = fma(-shift, w, e);
      product = fma(e, w, product);
      square = fma(w, w, square);
    }
    s2 = fma(e, e, s2);
  };
  const auto add_edge = [&](int64_t c, int64_t count, int64_t skip) SELBP_LAMBDA {
    const Edge<T> edge(z, columns, c, count, skip);
    V v = edge.v, w = splat(A(1)), derivative{};
    if (kCap) v = soft_cap<A>(v, cap, derivative);
    if (kSmooth && weight) w = Edge<A>(weight, columns, c, count, skip).v;
    add(edge.present ? v : lowest, edge.present ? w : zero, derivative);
  };
  if (kSmooth) {  // the slope of the first chunk, so that the block's fit is summed near its own slope
    add_edge(0, columns < S::kLanes ? columns : int64_t(S::kLanes), y >= 0 && y < S::kLanes ? y : -1);
    const A squares = A(sum<A>(square));
    if (squares > 0) shift = splat(A(sum<A>(product)) / squares);
    s = s2 = product = square = spread = amount = zero;
  }
  for_each_chunk<S::kLanes>(
      columns, y,
      [&](int64_t c) SELBP_LAMBDA {
        V v = load(z + c), derivative{};
        if (kCap) v = soft_cap<A>(v, cap, derivative);
        add(v, kSmooth && weight ? load(weight + c) : splat(A(1)), derivative);
      },
      add_edge);
  state.s += sum<A>(s);
  if (kSmooth) {
    join_fit(state, static_cast<double>(shift[0]), sum<A>(s2), sum<A>(product), sum<A>(square));
    state.spread += sum<A>(spread);
    state.amount += sum<A>(amount);
  } else {
    state.s2 += sum<A>(s2);
  }
}

// sum of squares of `count` values
template <class T>
double square_sum(const T* p, int64_t count) {
  using A = Compute<T>;
  constexpr int64_t kLanes = Simd<A>::kLanes;
  constexpr int kParts = 4;  // as many sums at a time: one alone would wait for its last addition
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    typename Simd<A>::V part[kParts]{};
    const int64_t end = count - start < kBlock ? count : start + kBlock;
    int64_t c = start;
    for (; c + kParts * kLanes <= end; c += kParts * kLanes) {
      for (int i = 0; i < kParts; ++i) {
        const auto v = load(p + c + i * kLanes);
        part[i] = fma(v, v, part[i]);
      }
    }
    for (; c < end; c += kLanes) {
      const auto v = c + kLanes <= end ? load(p + c) : load_first(p + c, end - c);
      part[0] = fma(v, v, part[0]);
    }
    total += sum<A>((part[0] + part[1]) + (part[2] + part[3]));
  }
  return total;
}

double row_square_sum(const Matrix& matrix, int64_t row) {
  const int64_t offset = row * matrix.row_stride;
  switch (matrix.type) {
    case Type::f32: return square_sum(static_cast<const float*>(matrix.data) + offset, matrix.columns);
    case Type::f64: return square_sum(static_cast<const double*>(matrix.data) + offset, matrix.columns);
    case Type::bf16: return square_sum(static_cast<const BFloat16*>(matrix.data) + offset, matrix.columns);
    default: return square_sum(static_cast<const Half*>(matrix.data) + offset, matrix.columns);
  }
}

struct RowResult {
  double loss, lse, residual_sq, p_rest;
  bool correct;
};

// The row's statistics from its complete state. y is the target, or -1 where it is ignored.
RowResult finish(const RowState& state, int64_t y, double w_y, double smooth_each, double label_smoothing) {
  const bool alone = state.s == 0;  // no other class, or every other one is masked
  const double z_y = state.z_y < kInfinity ? state.z_y : __builtin_nan("");  // a logit of +inf leaves no loss
  const double a = y < 0 ? -kInfinity : z_y - state.m;
  // lse - m and lse - z_y, each without cancellation.
  double above_m, loss_y, p_m;  // p_m = e^(m - lse), the probability of the greatest other logit
  if (a > 0) {
    const double e = alone ? 0.0 : __builtin_exp(-a);
    loss_y = __builtin_log1p(state.s * e);
    above_m = a + loss_y;
    p_m = e / (1 + state.s * e);
  } else {
    const double sum = state.s + __builtin_exp(a);
    above_m = __builtin_log(sum);
    loss_y = above_m - a;
    p_m = 1 / sum;
  }
  RowResult result{0, a > 0 ? z_y + loss_y : state.m + above_m, 0, 0, false};
  if (y < 0) return result;

  const double p_rest = state.s * p_m;
  const double target_y = (1 - label_smoothing) * w_y + smooth_each * w_y;
  const double rest = smooth_each * state.amount;  // sum over the others of the soft target
  const double total = target_y + rest;
  result.loss = target_y * loss_y;
  if (rest != 0) result.loss += smooth_each * (state.amount * above_m + state.spread);
  const double r_y = (rest - total * p_rest) * state.derivative_y;
  const double scale = total * p_m;
  const double miss = scale * state.rho - smooth_each;
  result.residual_sq = r_y * r_y + scale * scale * state.s2 + miss * miss * state.square;
  result.p_rest = p_rest;
  result.correct = z_y >= state.m;
  return result;
}

template <class A>
void write(const StatisticsOutput& out, int64_t row, const RowResult& result, bool ignored, double feature_sq) {
  const A loss = A(result.loss), lse = A(result.lse), residual_sq = A(result.residual_sq), sq = A(feature_sq);
  const bool finite =
      __builtin_isfinite(loss) && __builtin_isfinite(lse) && __builtin_isfinite(residual_sq) && __builtin_isfinite(sq);
  const A nan = A(__builtin_nan(""));
  static_cast<A*>(out.loss)[row] = loss;
  static_cast<A*>(out.lse)[row] = lse;
  static_cast<A*>(out.residual_sq)[row] = __builtin_isfinite(loss) || ignored ? residual_sq : nan;
  static_cast<A*>(out.feature_sq)[row] = sq;
  if (out.p_rest) static_cast<A*>(out.p_rest)[row] = A(result.p_rest);
  out.valid[row] = finite && !ignored;
  out.correct[row] = finite && !ignored && result.correct;
}

template <class T, bool kSmooth, bool kCap>
void run_statistics(const Matrix& logits, int64_t first_class, int64_t n_classes, const Matrix& features,
                    bool feature_bias, const LossOptions& options, RowState* states, const StatisticsOutput& output,
                    int n_threads) {
  using A = Compute<T>;
  const A* weight = static_cast<const A*>(options.class_weight);
  const double smooth_each = options.label_smoothing / static_cast<double>(n_classes);
  parallel_for(logits.rows, n_threads, 0, [&](int64_t row) {
    const T* z = static_cast<const T*>(logits.data) + row * logits.row_stride;
    const int64_t y = options.target[row] == options.ignore_index ? -1 : options.target[row];
    RowState local{-kInfinity, 0, 0, 0, 0, 0, 0, __builtin_nan(""), 1};
    RowState& state = states ? states[row] : local;
    if (states && first_class == 0) state = local;
    const int64_t y_here = y - first_class;
    if (y >= 0 && y_here >= 0 && y_here < logits.columns)
      state.z_y = kCap ? cap_one(z[y_here], options.softcap, &state.derivative_y) : widen(z[y_here]);
    for (int64_t c = 0; c < logits.columns; c += kBlock) {
      const int64_t length = logits.columns - c < kBlock ? logits.columns - c : kBlock;
      const bool only_target = length == 1 && y >= 0 && y_here == c;
      if (only_target) continue;
      add_block<T, kSmooth, kCap>(z + c, length, y < 0 ? -1 : y_here - c, weight ? weight + first_class + c : nullptr,
                                  options.softcap, state);
    }
    if (first_class + logits.columns == n_classes) {
      const double w_y = weight && y >= 0 ? static_cast<double>(weight[y]) : 1.0;
      const RowResult result = finish(state, y, w_y, smooth_each, options.label_smoothing);
      const double feature_sq = features.data ? row_square_sum(features, row) + (feature_bias ? 1.0 : 0.0) : 1.0;
      write<A>(output, row, result, y < 0, feature_sq);
    }
  });
}

struct StatisticsBody {
  const Matrix& logits;
  int64_t first_class, n_classes;
  const Matrix& features;
  bool feature_bias;
  const LossOptions& options;
  RowState* state;
  const StatisticsOutput& output;
  int n_threads;
  template <class T, bool kSmooth, bool kCap>
  void run() const {
    run_statistics<T, kSmooth, kCap>(logits, first_class, n_classes, features, feature_bias, options, state, output,
                                     n_threads);
  }
};

}  // namespace

int64_t statistics(const Matrix& logits, int64_t first_class, int64_t n_classes, const Matrix& features,
                   bool feature_bias, const LossOptions& options, RowState* state, const StatisticsOutput& output,
                   int n_threads) {
  const int64_t bad = first_bad_target(options, logits.rows, n_classes);
  if (bad >= 0) return bad;
  dispatch(logits.type, options,
           StatisticsBody{logits, first_class, n_classes, features, feature_bias, options, state, output, n_threads});
  return -1;
}

int64_t head_statistics(const Matrix& features, const Matrix& weight, const float* bias, const LossOptions& options,
                        const StatisticsOutput& output, float* scratch) {
  const int64_t classes = weight.rows, depth = weight.columns;
  const int64_t bad = first_bad_target(options, features.rows, classes);
  if (bad >= 0) return bad;
  const int64_t stride = (classes + kHeadLanes - 1) / kHeadLanes * kHeadLanes;
  float* const packed = scratch;
  float* const logits = packed + stride * depth;           // [row][class]
  float* const transposed = logits + stride * kHeadLanes;  // [class][row]
  pack_head(weight, packed);
  const float* class_weight = static_cast<const float*>(options.class_weight);
  for (int64_t first = 0; first < features.rows; first += kHeadLanes) {
    const int count = static_cast<int>(features.rows - first < kHeadLanes ? features.rows - first : kHeadLanes);
    const float* x = static_cast<const float*>(features.data) + first * features.row_stride;
    for (int64_t c = 0; c < stride; c += kHeadLanes) {
      int r = 0;
      for (; r + 8 <= count; r += 8)
        head_group<8>(x + r * features.row_stride, features.row_stride, packed + c * depth, depth,
                      logits + r * stride + c, stride);
      for (; r < count; ++r)
        head_group<1>(x + r * features.row_stride, features.row_stride, packed + c * depth, depth,
                      logits + r * stride + c, stride);
    }
    int32_t y[kHeadLanes];
    for (int r = 0; r < kHeadLanes; ++r)
      y[r] = r < count && options.target[first + r] != options.ignore_index ? int32_t(options.target[first + r]) : -1;
    const HeadState sums = head_sums(logits, stride, bias, classes, y, transposed);
    for (int r = 0; r < count; ++r) {
      const RowState state{sums.m[r], sums.s[r], sums.s2[r], 0, 0, 0, 0, sums.z_y[r], 1};
      const double w_y = class_weight && y[r] >= 0 ? static_cast<double>(class_weight[y[r]]) : 1.0;
      const RowResult result = finish(state, y[r], w_y, 0.0, 0.0);
      const double feature_sq = square_sum(x + r * features.row_stride, depth) + (bias ? 1.0 : 0.0);
      write<float>(output, first + r, result, y[r] < 0, feature_sq);
    }
  }
  return -1;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
