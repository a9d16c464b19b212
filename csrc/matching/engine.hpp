// The matching solver: at most k of n rows S and weights w >= 0 that make ||y - sum_S w_j g_j||^2 + lambda ||w||^2
// small, chosen greedily, from the inner products alone: K = (g_i . g_j), b = (g_i . y), ||y||^2.
//
// One tableau does everything. G = K + lambda I, G_SS = L L^T, and beside the n columns stand k *slot* columns, one
// for each chosen row, which start as columns of the identity:
//
//                     n main columns                     k slot columns
//            +------------------------------------+------------------------+
//     q_0    |                                    | x                      |
//     q_1    |        Q = L^-1 G_S,:              | x x       L^-1         |    one row for each chosen row
//     q_t-1  |                                    | x x x                  |
//            +------------------------------------+------------------------+
//     c      |  b - G_:,S w     (correlations)    |  -w     (the weights!) |    c = [b | 0] - Q^T z,  z = L^-1 b_S
//     D      |  G_jj - sum_s q_s[j]^2             |  1 in use, 0 free      |
//            +------------------------------------+------------------------+
//
// D_j is the squared distance of g_j from the span of S (with the ridge), so D_j > rank * G_jj is the rank test and
// c_j^2 / D_j the exact decrease of the objective if j joined: orthogonal least squares costs nothing extra. The slot
// columns carry the weights along without a triangular solve.
//
//   append i    h_s = q_s[i];  rho^2 = D_i;  z_t = c_i / rho;  q_t = ([G | I]_i - sum_s h_s q_s) / rho;
//               c -= z_t q_t;  D -= q_t^2;  score;  arg max;  has a weight turned <= 0?        (one sweep, fused)
//   remove l    v = column of slot l = L^-1 e_l. Givens rotations of rows l, l+1 .. t-1 that zero v from the top carry
//               row l down to the end: there it is orthogonal to every other chosen column. Dropping it gives
//               c += z_l q_l;  D += q_l^2.
//   feasible    a weight <= 0 after an append: Lawson & Hanson's walk from the last feasible weights to the first zero,
//               remove that row, again. With k = n the whole is Lawson-Hanson NNLS.
//
// It stops at k rows, at the tolerance, when no column is eligible (the KKT conditions), or after 3 k + 16 appends.
//
// Cost: n k^2 multiply-adds and 2 n k^2 bytes of f32, which is what bounds it. Where those come from beyond L1, a pass
// forms the rows of the best few candidates at once (*lookahead*) and shelves them: a later pivot found there resumes
// at the row where the pass ended. Each column subtracts the same products in the same order, so the result is the same
// to the bit.
#pragma once

#include "matching/workspace.hpp"

namespace selbp {
namespace SELBP_LEVEL {

using matching::Answer;
using matching::Options;
using matching::Problem;
using matching::Rule;
using matching::Status;

template <class T>
struct Thresholds;  // of a squared distance relative to its start (rank), of a cosine to the target (noise)
template <>
struct Thresholds<float> {
  static constexpr float kRank = 1e-5f, kNoise = 1e-6f;
};
template <>
struct Thresholds<double> {
  static constexpr double kRank = 1e-11, kNoise = 1e-12;
};

// e with 4^e * square in [1, 4); 0 for what is not positive
SELBP_HD int halved_exponent(double square) {
  if (!(square > 0)) return 0;
  int exponent;
  frexp(square, &exponent);  // square in [2^(exponent - 1), 2^exponent)
  return -((exponent - 1) >> 1);
}

template <class Team, class T>
class Engine {
 public:
  using Work = Workspace<T, Team::kPanel>;

  SELBP_HD Engine(Team& team, const Options& options, const Problem<T>& problem, const Work& work)
      : team_(team), options_(options), problem_(problem), work_(work), shape_(options.n, options.k) {
    forget_lookahead();
  }

  SELBP_METHOD void solve(const Answer<T>& answer) {
    Status status = Status::invalid;
    if (prepare()) status = pursue();
    report(answer, status);
  }

 private:
  // ------------------------------------------------------------------------------------------------ setting up
  SELBP_HD bool valid(int row) const { return !problem_.valid || problem_.valid[row]; }
  SELBP_HD const T* gram_row(int row) const { return problem_.gram + std::size_t(row) * std::size_t(options_.n); }

  // Scales the problem by powers of two (exactly), so that max diag K and ||y||^2 lie in [1, 4), and fills the columns.
  SELBP_METHOD bool prepare() {
    const int n = options_.n, main = shape_.main;
    target_sq_ = *problem_.target_sq;
    if (!(target_sq_ >= T(0) && target_sq_ <= Limits<T>::kMax)) return false;
    team_.each(main, [&](int j) {
      const bool there = j < n && valid(j);
      work_.unit[j] = there ? T(1) : T(0);
      work_.distance[j] = there ? gram_row(j)[j] : T(0);
      work_.correlation[j] = there ? problem_.inner[j] : T(0);
    });
    team_.sync();
    if (!team_.all_finite(problem_.gram, n, problem_.valid ? work_.unit : nullptr)) return false;
    const Best<T> top = team_.argmax(main, main, [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
      vote.score = j.load(work_.distance);
      vote.spoiled = !(magnitude(j.load(work_.correlation)) <= Limits<T>::kMax);
    });
    if (top.spoiled) return false;
    const int row_exponent = halved_exponent(double(top.score)), target_exponent = halved_exponent(double(target_sq_));
    row_scale_ = T(ldexp(1.0, row_exponent));
    target_scale_ = T(ldexp(1.0, target_exponent));
    weight_scale_ = ldexp(1.0, row_exponent - target_exponent);
    target_sq_ = target_sq_ * target_scale_ * target_scale_;
    objective_ = target_sq_;
    noise_ = Thresholds<T>::kNoise * square_root(target_sq_);
    ridge_ = T(options_.ridge * mean_diagonal());

    team_.each(main, [&](int j) {
      const T square = work_.distance[j] * row_scale_ * row_scale_, ridged = square + ridge_;
      const bool alive = square > T(0) && ridged > T(0) && ridged <= Limits<T>::kMax;
      work_.distance[j] = alive ? ridged : T(0);
      work_.floor[j] = alive ? Thresholds<T>::kRank * ridged : Limits<T>::kInfinity;
      work_.unit[j] = alive ? T(1) / square_root(ridged) : T(0);
      work_.correlation[j] = work_.correlation[j] * row_scale_ * target_scale_;
    });
    team_.each(shape_.count - main, [&](int s) {
      work_.distance[main + s] = T(0);
      work_.correlation[main + s] = T(0);
    });
    team_.each(shape_.rows, [&](int u) { work_.slot[u] = main + u; });
    team_.sync();
    return true;
  }

  // Mean of the scaled diagonal over the valid rows, summed in 32 interleaved parts whatever the size of the team.
  SELBP_METHOD double mean_diagonal() {
    team_.each(32, [&](int part) {
      double sum = 0, rows = 0;
      for (int j = part; j < options_.n; j += 32) {
        sum += double(work_.distance[j] * row_scale_ * row_scale_);
        rows += valid(j) ? 1.0 : 0.0;
      }
      work_.partial[part] = sum;
      work_.partial[32 + part] = rows;
    });
    team_.sync();
    double sum = 0, rows = 0;
    for (int part = 0; part < 32; ++part) {
      sum += work_.partial[part];
      rows += work_.partial[32 + part];
    }
    return rows > 0 ? sum / rows : 0.0;
  }

  // ------------------------------------------------------------------------------------------- the greedy loop
  SELBP_METHOD Status pursue() {
    Best<T> best = scan();
    for (int appends = 0;; ++appends) {
      if (rows_ == options_.k) return Status::full;
      const T tolerance = T(options_.tolerance);
      if (tolerance > T(0) && objective_ <= tolerance * tolerance * target_sq_) return Status::tolerance;
      if (best.index < 0 && barred_ && progressed_) {  // the bar may hide an eligible row: to stop now would be wrong
        lift_bars();
        best = scan();
      }
      if (best.index < 0) return Status::optimal;
      if (appends == 3 * options_.k + 16) return Status::iterations;
      const int pivot = best.index;
      team_.turn();
      best = append(pivot);
      if (best.spoiled) return Status::invalid;  // what came was not positive semidefinite, and overflowed
      if (best.flag) {
        make_feasible();
        bar_if_gone(pivot);
        best = scan();
      } else {
        progressed_ = true;
      }
    }
  }

  template <class Columns, class Value>
  SELBP_HD Value score(Columns j, Value correlation, Value distance) const {
    const Value aligned = options_.nonnegative ? correlation : magnitude(correlation);
    const Value cosine = aligned * j.load(work_.unit);
    const auto eligible = (cosine > noise_) & (distance > j.load(work_.floor));
    Value value = aligned;
    if (options_.rule == Rule::ols) value = aligned * (aligned / distance);
    if (options_.rule == Rule::normalized) value = cosine;
    return choose(eligible, value, T(-1));
  }

  SELBP_METHOD Best<T> scan() {
    return team_.argmax(shape_.main, shape_.main, [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
      vote.score = score(j, j.load(work_.correlation), j.load(work_.distance));
      keep_score(j, vote.score);
    });
  }

  SELBP_HD int live_columns() const { return shape_.main + live_slots_; }

  // Row i of [G | I], scaled: the entries of rows that may not be chosen read as 0, whatever stands there.
  template <class Columns>
  SELBP_HD typename Columns::Value pivot_row(Columns j, int pivot) const {
    if (j.first >= shape_.main) return j.fill(T(0));
    auto row = j.load_row(gram_row(pivot), options_.n) * row_scale_ * row_scale_;
    row = choose(j.load(work_.unit) > T(0), row, T(0));
    return j.add_at(row, pivot, ridge_);
  }

  // The slot's panel comes into use: its rows so far are zero, and nobody has written them.
  SELBP_HD void open_slot(int slot) {
    if (slot < live_columns()) return;
    const int panel = live_columns();
    team_.each(rows_ * Team::kPanel,
               [&](int i) { *work_.tableau.at(i / Team::kPanel, panel + i % Team::kPanel) = T(0); });
    live_slots_ += Team::kPanel;
  }

  // Until a row is removed, slot u serves row u, and the slot columns are zero above their own row: no need to read
  // that.
  template <class Columns>
  SELBP_HD int first_row(Columns j, int begin) const {
    const int own = removed_ ? 0 : j.first - shape_.main;
    return own > begin ? own : begin;
  }

  // Adds row `pivot` to S; returns the next pivot, whether a weight is no longer positive, whether numbers overflowed.
  SELBP_METHOD Best<T> append(int pivot) {
    const int last = rows_, slot = work_.slot[last];
    const T inverse = T(1) / square_root(work_.distance[pivot]), z = work_.correlation[pivot] * inverse;
    int begin;
    const int shelf_row = take_from_shelf(pivot, begin);
    team_.broadcast(last, [&](int s) { work_.pivot_column[s] = -*work_.tableau.at(s, pivot); });
    team_.once([&] {
      work_.order[last] = pivot;
      work_.z[last] = z;
      work_.floor[pivot] = Limits<T>::kInfinity;
      work_.distance[slot] = T(1);
    });
    open_slot(slot);
    team_.sync();
    const Best<T> best = team_.argmax(shape_.main, live_columns(), [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
      auto row = shelf_row < 0 ? pivot_row(j, pivot) : j.load(work_.shelf, shelf_row);
      row = j.add_at(row, slot, T(1));
      for (int s = first_row(j, begin); s < last; ++s)
        row = fused(work_.pivot_column[s], j.load(work_.tableau, s), row);
      row = row * inverse;
      j.store(work_.tableau, last, row);
      const auto correlation = fused(-z, row, j.load(work_.correlation));
      j.store(work_.correlation, correlation);
      auto distance = j.load(work_.distance);
      vote.spoiled = !(magnitude(correlation) <= Limits<T>::kMax);
      if (j.first < shape_.main) {
        distance = fused(-row, row, distance);
        j.store(work_.distance, distance);
        vote.score = score(j, correlation, distance);
        keep_score(j, vote.score);
      } else if (options_.nonnegative) {
        vote.flag = (distance > T(0)) & (correlation >= T(0));
      }
    });
    rows_ = last + 1;
    objective_ = fused(-z, z, objective_);
    return best;
  }

  // ------------------------------------------------------------------------------- Lawson & Hanson's inner loop
  // Walks from the weights before the last append to those after it until the first reaches 0, drops that row, again.
  SELBP_METHOD void make_feasible() {
    const int newest = rows_ - 1, main = shape_.main;
    const T z = work_.z[newest];
    team_.columns(main, live_columns(), [&](auto j) SELBP_INLINE_LAMBDA {
      if (j.first < main) return;
      const auto before = -fused(z, j.load(work_.tableau, newest), j.load(work_.correlation));
      j.store(work_.held, choose(before > T(0), before, T(0)));
    });
    team_.sync();
    while (rows_ > 0) {
      const Best<T> first = team_.argmax(main, live_columns(), [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
        if (j.first < main) return;
        const auto held = j.load(work_.held), correlation = j.load(work_.correlation);  // the weight is -correlation
        const auto length = held + correlation;
        const auto step = choose(length > T(0), held / length, T(0));
        const auto stops = (j.load(work_.distance) > T(0)) & (correlation >= T(0));
        vote.score = choose(stops, fused(T(-1), step, j.fill(T(1))), T(-1));
      });
      if (first.index < 0) return;
      const T held = work_.held[first.index], length = held + work_.correlation[first.index];
      const T step = length > T(0) ? held / length : T(0);
      team_.sync();
      team_.columns(main, live_columns(), [&](auto j) SELBP_INLINE_LAMBDA {
        if (j.first < main) return;
        const auto before = j.load(work_.held);
        const auto there = fused(step, -(before + j.load(work_.correlation)), before);
        j.store(work_.held, choose(there > T(0), there, T(0)));
      });
      remove(row_of_slot(first.index));
    }
  }

  SELBP_HD int row_of_slot(int slot) const {
    int row = 0;
    while (work_.slot[row] != slot) ++row;
    return row;
  }

  SELBP_METHOD void remove(int row) {
    const int last = rows_ - 1, slot = work_.slot[row], column = work_.order[row], main = shape_.main;
    team_.once([&] { rotations(row, slot); });
    team_.sync();
    const T z = work_.z[last];
    team_.columns(main, live_columns(), [&](auto j) SELBP_INLINE_LAMBDA {
      auto carried = j.load(work_.tableau, row);
      for (int s = row; s < last; ++s) {
        const T cosine = work_.cosine[s], sine = work_.sine[s];
        const auto next = j.load(work_.tableau, s + 1);
        j.store(work_.tableau, s, fused(cosine, carried, next * sine));
        carried = fused(-sine, carried, next * cosine);
      }
      j.store(work_.correlation, fused(z, carried, j.load(work_.correlation)));
      if (j.first < main) j.store(work_.distance, fused(carried, carried, j.load(work_.distance)));
    });
    team_.sync();
    team_.each(last, [&](int s) { *work_.tableau.at(s, slot) = T(0); });
    team_.once([&] {
      work_.correlation[slot] = T(0);
      work_.distance[slot] = T(0);
      work_.floor[column] = Thresholds<T>::kRank * (gram_row(column)[column] * row_scale_ * row_scale_ + ridge_);
      for (int s = row; s < last; ++s) {
        work_.order[s] = work_.order[s + 1];
        work_.slot[s] = work_.slot[s + 1];
      }
      work_.slot[last] = slot;
    });
    team_.sync();
    rows_ = last;
    objective_ = fused(z, z, objective_);
    removed_ = true;
    forget_lookahead();
  }

  // Angles that move the column of `slot` (zero above `row`) into the last row, and the same turns of z.
  SELBP_HD void rotations(int row, int slot) {
    T carried = *work_.tableau.at(row, slot), z = work_.z[row];
    for (int s = row; s < rows_ - 1; ++s) {
      const T next = *work_.tableau.at(s + 1, slot), next_z = work_.z[s + 1];
      const T radius = square_root(fused(carried, carried, next * next));
      const T cosine = -next / radius, sine = carried / radius;
      work_.cosine[s] = cosine;
      work_.sine[s] = sine;
      work_.z[s] = fused(cosine, z, sine * next_z);
      z = fused(-sine, z, cosine * next_z);
      carried = fused(-sine, carried, cosine * next);
    }
    work_.z[rows_ - 1] = z;
  }

  // A row that entered and left in the same turn would be chosen again at once: it waits until another row has stayed.
  SELBP_METHOD void bar_if_gone(int pivot) {
    bool gone = true;
    for (int u = 0; u < rows_; ++u) gone = gone && work_.order[u] != pivot;
    team_.sync();
    if (gone) team_.once([&] { work_.floor[pivot] = Limits<T>::kInfinity; });
    team_.sync();
    progressed_ = gone ? progressed_ && barred_ : true;  // since the first bar
    barred_ = barred_ || gone;
  }

  SELBP_METHOD void lift_bars() {
    team_.each(options_.n, [&](int j) {
      const T ridged = work_.unit[j] > T(0) ? gram_row(j)[j] * row_scale_ * row_scale_ + ridge_ : Limits<T>::kInfinity;
      work_.floor[j] = Thresholds<T>::kRank * ridged;
    });
    team_.sync();
    team_.each(rows_, [&](int u) { work_.floor[work_.order[u]] = Limits<T>::kInfinity; });
    team_.sync();
    barred_ = progressed_ = false;
  }

  // -------------------------------------------------------------------------------------------------- lookahead
  static constexpr int kLookahead = Team::kLookahead, kShelf = Team::kShelf;

  template <class Columns, class Value>
  SELBP_HD void keep_score(Columns j, Value value) const {
    if constexpr (kLookahead > 0) {
      if (work_.score) j.store(work_.score, value);
    }
  }

  SELBP_HD void forget_lookahead() {
    if constexpr (kLookahead > 0) {
      for (int& pivot : shelf_pivot_) pivot = -1;
    }
  }

  // The shelf's place that holds [G | I]_pivot - sum_{s < begin} h_s q_s for some `begin`, or -1. Where the pivot is
  // not on the shelf and the tableau is large, the pass that forms it also forms the rows that are likely to come next.
  SELBP_METHOD int take_from_shelf(int pivot, int& begin) {
    begin = 0;
    if constexpr (kLookahead > 0) {
      if (!work_.score) return -1;
      int place = 0;
      while (place < kShelf && shelf_pivot_[place] != pivot) ++place;
      if (place == kShelf) {
        const std::size_t bytes = std::size_t(rows_) * std::size_t(live_columns()) * sizeof(T);
        if (bytes < options_.near_bytes) return -1;
        place = fill_shelf(pivot);
      }
      shelf_pivot_[place] = -1;  // used up
      begin = shelf_begin_[place];
      return place;
    }
    return -1;
  }

  // Forms `pivot` and the best rows that are not on the shelf, in the places that were filled longest ago.
  SELBP_METHOD int fill_shelf(int pivot) {
    for (int other : shelf_pivot_)
      if (other >= 0) work_.score[other] = T(-1);
    int formed[kLookahead];
    for (int r = 0; r < kLookahead; ++r) {
      formed[r] = pivot;
      if (r > 0) {
        const Best<T> next = team_.argmax(shape_.main, shape_.main, [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
          vote.score = j.load(work_.score);
        });
        if (next.index >= 0) formed[r] = next.index;  // else the pivot once more: harmless
      }
      work_.score[formed[r]] = T(-1);
      shelf_pivot_[shelf_next_ + r] = formed[r];
      shelf_begin_[shelf_next_ + r] = rows_;
      for (int s = 0; s < rows_; ++s) work_.shelf_column[s * kLookahead + r] = -*work_.tableau.at(s, formed[r]);
    }
    const int place = shelf_next_;
    form_rows(formed, place);
    shelf_next_ = (shelf_next_ + kLookahead) % kShelf;
    return place;
  }

  SELBP_METHOD void form_rows(const int* formed, int place) {
    team_.template columns<Team::kLookaheadLines>(shape_.main, live_columns(), [&](auto j) SELBP_INLINE_LAMBDA {
      typename decltype(j)::Value sum[kLookahead];
      SELBP_UNROLL
      for (int r = 0; r < kLookahead; ++r) sum[r] = pivot_row(j, formed[r]);
      const int end = rows_;
      int s = first_row(j, 0);
      for (const T* columns = work_.shelf_column + s * kLookahead; s < end; ++s, columns += kLookahead) {
        const auto row = j.load(work_.tableau, s);
        SELBP_UNROLL
        for (int r = 0; r < kLookahead; ++r) sum[r] = fused(columns[r], row, sum[r]);
      }
      SELBP_UNROLL
      for (int r = 0; r < kLookahead; ++r) j.store(work_.shelf, place + r, sum[r]);
    });
    for (int j = live_columns(); j < shape_.count; ++j)  // slots that come into use later
      for (int r = 0; r < kLookahead; ++r) *work_.shelf.at(place + r, j) = T(0);
  }

  // ------------------------------------------------------------------------------------------------- the answer
  SELBP_HD T weight(int row) const { return T(double(-work_.correlation[work_.slot[row]]) * weight_scale_); }

  SELBP_METHOD void report(const Answer<T>& answer, Status status) {
    if (status != Status::invalid) {
      const Best<T> huge = team_.argmax(shape_.main, live_columns(), [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
        if (j.first < shape_.main) return;
        vote.spoiled = !(magnitude(j.load(work_.correlation)) * T(weight_scale_) <= Limits<T>::kMax);
      });
      if (huge.spoiled) status = Status::invalid;
    }
    const bool usable = status != Status::invalid;
    const int count = usable ? rows_ : 0;
    team_.each(options_.k, [&](int u) {
      answer.indices[u] = u < count ? work_.order[u] : -1;
      answer.weights[u] = u < count ? weight(u) : T(0);
    });
    quadratic_form(count);
    team_.once([&] {
      double square = double(target_sq_);
      for (int u = 0; u < count; ++u) square += work_.partial[u];
      const double relative = target_sq_ > T(0) && square > 0 ? square / double(target_sq_) : 0.0;
      *answer.count = count;
      *answer.residual = usable ? T(square_root(relative)) : Limits<T>::kNaN;
      *answer.status = static_cast<unsigned char>(status);
    });
    team_.sync();
  }

  // partial[u]: the terms of w^T K w - 2 b^T w in which u is the later row, in double precision from the inputs.
  SELBP_METHOD void quadratic_form(int count) {
    const double row_scale = double(row_scale_), target_scale = double(target_scale_);
    team_.each(count, [&](int u) {
      const int row = work_.order[u];
      const T* gram = gram_row(row);
      double sum = 0;
      for (int s = 0; s < u; ++s)
        sum = fused(-double(work_.correlation[work_.slot[s]]), double(gram[work_.order[s]]), sum);
      const double w = -double(work_.correlation[work_.slot[u]]);
      sum = fused(w, double(gram[row]), 2.0 * sum) * row_scale * row_scale;
      work_.partial[u] = w * (sum - 2.0 * double(problem_.inner[row]) * row_scale * target_scale);
    });
    team_.sync();
  }

  Team& team_;
  const Options& options_;
  const Problem<T>& problem_;
  const Work& work_;
  const Shape<T, Team::kPanel> shape_;

  T row_scale_, target_scale_, target_sq_, objective_, noise_, ridge_;  // of the scaled problem, but for the scales
  double weight_scale_;
  int rows_ = 0;                              // t, the rows chosen so far
  int live_slots_ = 0;                        // whole panels of slots that have been used
  bool removed_ = false;                      // a row has left S, so slots no longer stand in the order of the rows
  bool barred_ = false, progressed_ = false;  // a row waits; a row has stayed since
  int shelf_pivot_[kShelf + 1], shelf_begin_[kShelf + 1];  // whose row stands there, up to which row it is formed
  int shelf_next_ = 0;
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
