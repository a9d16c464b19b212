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
//
// The class stands here with its greedy loop; setup.hpp, feasible.hpp and lookahead.hpp hold the rest of its methods.
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

  SELBP_METHOD bool prepare();
  SELBP_METHOD double mean_diagonal();

  // ------------------------------------------------------------------------------------------- the greedy loop
  SELBP_METHOD Status pursue() {
    Best<T> best = scan();
    for (int appends = 0;; ++appends) {
      if (rows_ == options_.k) return Status::full;
      const T tolerance = T(options_.tolerance);
      if (tolerance > T(0) && objective_ <= tolerance * tolerance * target_sq_) return Status::tolerance;
      if (best.index < 0) return Status::optimal;
      if (appends == 3 * options_.k + 16) return Status::iterations;
      team_.turn(best.index);
      best = append(best.index);
      if (best.spoiled) return Status::invalid;  // what came was not positive semidefinite, and overflowed
      if (best.flag) {
        make_feasible();  // never drops the new row itself: docs/developer/solver.md
        best = scan();
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

  // Row i of [G | I], scaled. The entries of rows that may not be chosen read as 0, whatever stands there. The ridge is
  // left out of the pivot's diagonal entry: only the pivot's own column would change, and that column is masked while
  // the row is in S. When the row is removed, exactly what was subtracted is added back, because Givens rotations keep
  // the column's inner products.
  template <class Columns>
  SELBP_HD typename Columns::Value pivot_row(Columns j, int pivot) const {
    if (j.first >= shape_.main) return j.fill(T(0));
    auto row = j.load_row(gram_row(pivot), options_.n) * row_scale_ * row_scale_;
    return choose(j.load(work_.unit) > T(0), row, T(0));
  }

  // The slot's panel comes into use: its rows so far are zero, and nobody has written them.
  SELBP_HD void open_slot(int slot) {
    if (slot < live_columns()) return;
    T* panel = work_.tableau.at(0, live_columns());  // row follows row
    team_.each(rows_ * Team::kPanel, [&](int i) { panel[i] = T(0); });
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
    team_.broadcast(last - begin, [&](int i) { work_.pivot_column[begin + i] = -*work_.tableau.at(begin + i, pivot); });
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
  SELBP_METHOD void make_feasible();
  SELBP_HD int row_of_slot(int slot) const;
  SELBP_METHOD void remove(int row);
  SELBP_HD void rotations(int row, int slot);

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

  SELBP_METHOD int take_from_shelf(int pivot, int& begin);
  SELBP_METHOD int fill_shelf(int pivot);
  template <int count>
  SELBP_METHOD void form_rows(const int* formed, int place);

  // ------------------------------------------------------------------------------------------------- the answer
  SELBP_HD T weight(int row) const { return T(double(-work_.correlation[work_.slot[row]]) * weight_scale_); }

  SELBP_METHOD int spare_row(int count) const;
  SELBP_METHOD void report(const Answer<T>& answer, Status status);
  SELBP_METHOD void quadratic_form(int count);

  Team& team_;
  const Options& options_;
  const Problem<T>& problem_;
  const Work& work_;
  const Shape<T, Team::kPanel> shape_;

  T row_scale_, target_scale_, target_sq_, objective_, noise_, ridge_;  // of the scaled problem, but for the scales
  double weight_scale_;
  int rows_ = 0;          // t, the rows chosen so far
  int live_slots_ = 0;    // whole panels of slots that have been used
  bool removed_ = false;  // a row has left S, so slots no longer stand in the order of the rows
  int shelf_pivot_[kShelf + 1], shelf_begin_[kShelf + 1];  // whose row stands there, up to which row it is formed
  int shelf_next_ = 0;                                     // the place to fill next
  int shelf_formed_ = 0, shelf_used_ = 0;                  // rows that were shelved for later, and came to be used
};

}  // namespace SELBP_LEVEL
}  // namespace selbp

#include "matching/feasible.hpp"
#include "matching/lookahead.hpp"
#include "matching/setup.hpp"
