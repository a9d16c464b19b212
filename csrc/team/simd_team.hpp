// The team of one CPU thread: loops over columns run in groups of SIMD registers, and sync is nothing.
#pragma once

#include "team/simd.hpp"

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
    for (int r = 0; r < Value::kRegisters; ++r)
      out.v[r] = *reinterpret_cast<const typename Register<T>::Unaligned*>(array + first + r * Value::kLanes);
    return out;
  }
  SELBP_HD void store(T* array, Value value) const {
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r)
      *reinterpret_cast<typename Register<T>::Unaligned*>(array + first + r * Value::kLanes) = value.v[r];
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
      out.v[r] = *reinterpret_cast<const typename Register<T>::Unaligned*>(line + std::size_t(r / kPerLine) * stride +
                                                                           r % kPerLine * Value::kLanes);
    return out;
  }
  SELBP_HD void store(Panels<T, kPanel> panels, int row, Value value) const {
    T* line = panels.at(row, first);
    const std::size_t stride = std::size_t(panels.height) * kPanel;
#pragma GCC unroll 32
    for (int r = 0; r < Value::kRegisters; ++r)
      *reinterpret_cast<typename Register<T>::Unaligned*>(line + std::size_t(r / kPerLine) * stride +
                                                          r % kPerLine * Value::kLanes) = value.v[r];
  }

  // value + amount, in one column alone
  SELBP_HD Value add_at(Value value, int column, T amount) const {
    if (contains(column)) {
      alignas(kLineBytes) T copy[kCount] = {};
      copy[column - first] = amount;
      value = value + SimdColumns{0}.load(copy);
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
  // Lookahead (matching/engine.hpp): rows formed in one pass, and lines at once, so that both fit in registers.
#if defined(__AVX512F__)
  static constexpr int kLookahead = 4, kLookaheadLines = 4;
#else
  static constexpr int kLookahead = 4, kLookaheadLines = 1;
#endif
  static constexpr int kShelf = 32;  // rows that are kept for later, a multiple of kLookahead

  template <class F>
  SELBP_HD void each(int count, F f) const {
#pragma GCC ivdep
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
  SELBP_HD Best<T> argmax(int main, int count, F f) const {
    using Value = typename Register<T>::Value;
    using Mask = typename Register<T>::Mask;
    constexpr int kLanes = kVectorBytes / int(sizeof(T));
    Value score = Value{} - T(1);
    Mask index = Mask{} - 1, lane, flag = {}, spoiled = {};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    columns(main, count, [&](auto j) SELBP_INLINE_LAMBDA {
      auto vote = vote_of(j);
      f(j, vote);
      using Score = decltype(vote.score);
#pragma GCC unroll 32
      for (int r = 0; r < Score::kRegisters; ++r) {  // ascending: an equal score further right does not replace
        const Mask greater = vote.score.v[r] > score;
        score = greater ? vote.score.v[r] : score;
        index = greater ? lane + (j.first + r * kLanes) : index;
        flag |= vote.flag.v[r];
        spoiled |= vote.spoiled.v[r];
      }
    });
    Best<T> best{T(-1), -1, false, false};
    for (int i = 0; i < kLanes; ++i)
      if (index[i] >= 0) best = better(best, Best<T>{score[i], int(index[i]), false, false});
    for (int i = 0; i < kLanes; ++i) {
      best.flag = best.flag || flag[i];
      best.spoiled = best.spoiled || spoiled[i];
    }
    return best;
  }

  // Whether all entries (i, j) with valid[i] and valid[j] of an (n, n) matrix are finite; x * 0 is NaN where x is not.
  SELBP_HD bool all_finite(const T* matrix, int n, const unsigned char* valid) const {
    T spoiled = 0;
    for (int i = 0; i < n; ++i) {
      const T* row = matrix + std::size_t(i) * std::size_t(n);
      if (valid && !valid[i]) continue;
      if (!valid) {
        spoiled += zero_if_finite(row, n);
      } else {
        for (int j = 0; j < n; ++j) spoiled += valid[j] ? row[j] * T(0) : T(0);
      }
    }
    return spoiled == T(0);
  }

 private:
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

  SELBP_HD static T zero_if_finite(const T* row, int n) {
    Pack<T, 4> sum = Pack<T, 4>::fill(0);
    int j = 0;
    for (; j + SimdColumns<T, 4>::kCount <= n; j += SimdColumns<T, 4>::kCount)
      sum = fused(SimdColumns<T, 4>{j}.load(row), Pack<T, 4>::fill(0), sum);
    T total = 0;
    for (; j < n; ++j) total += row[j] * T(0);
    for (auto part : sum.v)
      for (int i = 0; i < Pack<T, 4>::kLanes; ++i) total += part[i];
    return total;
  }
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
