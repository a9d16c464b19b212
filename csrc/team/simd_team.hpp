// The team of one CPU thread: loops over columns run in groups of SIMD registers, and sync is nothing.
#pragma once

#include "matching/matching.hpp"
#include "team/pack.hpp"

namespace selbp {
namespace SELBP_LEVEL {

// Columns [first, first + lines * 64 bytes). Arrays of columns are 64-byte aligned and padded to whole lines.
template <class T, int lines>
struct SimdColumns {
  using Value = Pack<T, lines>;
  static constexpr int kPanel = kLineBytes / int(sizeof(T));
  static constexpr int kCount = lines * kPanel;
  static constexpr int kPerLine = kLineBytes / kVectorBytes;
  int first;

  SELBP_HD bool contains(int column) const { return unsigned(column - first) < unsigned(kCount); }
  SELBP_HD Value fill(T value) const { return Value::fill(value); }

  SELBP_HD Value load(const T* array) const {
    Value out;
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r) out.v[r] = SELBP_LEVEL::load(array + first + r * Value::kLanes);
    return out;
  }
  SELBP_HD void store(T* array, Value value) const {
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r) SELBP_LEVEL::store(array + first + r * Value::kLanes, value.v[r]);
  }

  // A row that ends at column `end`, somewhere inside the group perhaps: what lies beyond reads as 0.
  SELBP_HD Value load_row(const T* row, int end) const {
    if (first + kCount <= end) return load(row);
    alignas(kLineBytes) T copy[kCount] = {};
    for (int i = 0; first + i < end; ++i) copy[i] = row[first + i];
    return SimdColumns{0}.load(copy);
  }

  SELBP_HD Value load(Panels<T, kPanel> panels, int row) const {
    Value out;
    const T* line = panels.at(row, first);
    const std::size_t stride = std::size_t(panels.height) * kPanel;
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r)
      out.v[r] = SELBP_LEVEL::load(line + std::size_t(r / kPerLine) * stride + r % kPerLine * Value::kLanes);
    return out;
  }
  SELBP_HD void store(Panels<T, kPanel> panels, int row, Value value) const {
    T* line = panels.at(row, first);
    const std::size_t stride = std::size_t(panels.height) * kPanel;
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r)
      SELBP_LEVEL::store(line + std::size_t(r / kPerLine) * stride + r % kPerLine * Value::kLanes, value.v[r]);
  }

  // value + amount, in one column alone
  SELBP_HD Value add_at(Value value, int column, T amount) const {
    if (contains(column)) {
      const typename Simd<T>::I lane = lane_numbers<T>();
#pragma GCC unroll 32
      for (int r = 0; r < Value::kRegisters; ++r)
        value.v[r] = lane == column - first - r * Value::kLanes ? value.v[r] + amount : value.v[r];
    }
    return value;
  }
};

template <class T, int lines>
struct SimdVote {
  Pack<T, lines> score = Pack<T, lines>::fill(T(-1));
  PackMask<T, lines> flag = {}, spoiled = {};
};

template <class T>
class SimdTeam {
 public:
  static constexpr int kPanel = kLineBytes / int(sizeof(T));
  // Lookahead (matching/engine.hpp): rows formed in one pass at most, and rows that are kept for later.
  static constexpr int kLookahead = 4, kShelf = 32;
  static constexpr int kLookaheadLines = kVectorBytes == 64 ? 16 : 4;  // lines of sums that fit in registers

  // next: what this thread reads when it is done here, brought into the cache in `turns` parts.
  SimdTeam(const T* next, std::size_t bytes, int turns)
      : next_(reinterpret_cast<const char*>(next)),
        end_(next_ + bytes),
        part_(bytes / std::size_t(turns) + kLineBytes) {}

  // rows: where this problem's n rows come from. scores: scratch for a number each, padded as columns are.
  SimdTeam(const matching::RowSource* rows, T* scores, int n) : rows_(rows), scores_(scores), n_(n) {}

  SELBP_HD void turn(int row) {
    if (rows_ && !rows_->formed[row]) rows_->form(rows_->self, row, likely(row));
    const char* stop = std::size_t(end_ - next_) < part_ ? end_ : next_ + part_;
    for (; next_ < stop; next_ += kLineBytes) __builtin_prefetch(next_, 0, 2);
  }

  template <class F>
  SELBP_HD void each(int count, F f) const {
#if !defined(__clang__)  // clang checks for overlap at run time, and warns where it is told not to and cannot use it
#pragma GCC ivdep
#endif
    for (int i = 0; i < count; ++i) f(i);
  }
  template <class F>
  SELBP_HD void broadcast(int count, F f) const {
    each(count, f);
  }
  template <class F>
  SELBP_HD void once(F f) const {
    f();
  }
  SELBP_HD void sync() const {}

  // max_lines: fewer where f keeps several values for each column in registers.
  template <int max_lines = kGroupLines, class F>
  SELBP_HD void columns(int main, int count, F f) const {
    groups<max_lines>(0, main, f);
    groups<max_lines>(main, count, f);
  }

  template <class F>
  SELBP_HD Best<T> argmax(int main, int count, F f) {
    using Value = typename Simd<T>::V;
    using Mask = typename Simd<T>::I;
    Value score = Value{} - T(1);
    Mask index = Mask{} - 1, flags = {};
    const Mask lane = lane_numbers<T>();
    columns(main, count, [&](auto j) SELBP_INLINE_LAMBDA {
      auto vote = vote_of(j);
      f(j, vote);
      using Score = decltype(vote.score);
#pragma GCC unroll 32
      for (int r = 0; r < Score::kRegisters; ++r) {  // ascending: an equal score further right does not replace
        const Mask greater = vote.score.v[r] > score;
        score = greater ? vote.score.v[r] : score;
        index = greater ? lane + (j.first + r * kLanes) : index;
        flags |= (vote.flag.v[r] & 1) | (vote.spoiled.v[r] & 2);
        if (rows_ && j.first < main) SELBP_LEVEL::store(scores_ + j.first + r * kLanes, vote.score.v[r]);
      }
    });
    fold<kLanes / 2>(score, index, flags);
    return {score[0], int(index[0]), (flags[0] & 1) != 0, (flags[0] & 2) != 0};
  }

  // Whether all entries (i, j) of an (n, n) matrix are finite where there[i] and there[j] are positive; null: all.
  SELBP_HD bool all_finite(const T* matrix, int n, const T* there) const {
    if (rows_) return true;
    return there ? zero_if_finite<true>(matrix, n, there) == T(0) : zero_if_finite<false>(matrix, n, there) == T(0);
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  // The best row of the last arg max that is neither `row` nor formed; -1 for none. Rows like `row` count for less,
  // since they will lower the objective less once `row` has joined.
  SELBP_METHOD int likely(int row) const {
    int best = -1;
    T score = T(0);
    for (int other = 0; other < n_; ++other) {
      if (!(scores_[other] > score) || other == row || rows_->formed[other]) continue;
      const T rest = rows_->alike(rows_->self, row, other) ? T(0.2) * scores_[other] : scores_[other];
      if (!(rest > score)) continue;
      score = rest;
      best = other;
    }
    return best;
  }

  template <int lines>
  SELBP_HD static SimdVote<T, lines> vote_of(SimdColumns<T, lines>) {
    return {};
  }

  template <int lines, class F>
  SELBP_HD void groups(int begin, int end, F& f) const {
    constexpr int kCount = lines * kPanel;
    for (; begin + kCount <= end; begin += kCount) f(SimdColumns<T, lines>{begin});
    if constexpr (lines > 1) {
      if (begin < end) groups<lines / 2>(begin, end, f);
    }
  }

  // The sum of x * 0, which is NaN where x is not finite.
  template <bool masked>
  SELBP_HD static T zero_if_finite(const T* matrix, int n, const T* there) {
    constexpr int kLines = 4;
    Pack<T, kLines> sum = Pack<T, kLines>::fill(T(0));
    Pack<T, 1> rest = Pack<T, 1>::fill(T(0));
    for (int i = 0; i < n; ++i) {
      if (masked && !(there[i] > T(0))) continue;
      const T* row = matrix + std::size_t(i) * std::size_t(n);
      auto zero = [&](auto j, auto value) SELBP_INLINE_LAMBDA {
        if (masked) value = choose(j.load(there) > T(0), value, T(0));
        return value * T(0);
      };
      int begin = 0;
      for (; begin + kLines * kPanel <= n; begin += kLines * kPanel) {
        const SimdColumns<T, kLines> j{begin};
        sum = sum + zero(j, j.load(row));
      }
      for (; begin < n; begin += kPanel) {  // the last ones once more where a line of them would pass the end
        const SimdColumns<T, 1> j{begin + kPanel > n && n >= kPanel ? n - kPanel : begin};
        rest = rest + zero(j, j.load_row(row, n));
      }
    }
    T total = 0;
    for (auto part : sum.v)
      for (int i = 0; i < Pack<T, kLines>::kLanes; ++i) total += part[i];
    for (auto part : rest.v)
      for (int i = 0; i < Pack<T, 1>::kLanes; ++i) total += part[i];
    return total;
  }

  // The best of all lanes into the first, and whether any lane raised a flag; the lowest index wins ties.
  template <int half, class Value, class Mask>
  SELBP_HD static void fold(Value& score, Mask& index, Mask& flags) {
    if constexpr (half > 0) {
      const Value other = rotated<half>(score);
      const Mask place = rotated<half>(index), second = (other > score) | ((other == score) & (place < index));
      score = second ? other : score;
      index = second ? place : index;
      flags |= rotated<half>(flags);
      fold<half / 2>(score, index, flags);
    }
  }

  const char *next_ = nullptr, *end_ = nullptr;
  std::size_t part_ = 0;
  const matching::RowSource* rows_ = nullptr;  // null: the matrix is there
  T* scores_ = nullptr;                        // then: of the last arg max, each column's
  int n_ = 0;
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
