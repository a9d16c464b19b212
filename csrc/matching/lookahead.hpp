// Part of engine.hpp: rows of likely pivots, formed in one pass over the tableau and kept on a shelf.
#pragma once

namespace selbp {
namespace SELBP_LEVEL {

// The shelf's place that holds [G | I]_pivot - sum_{s < begin} h_s q_s for some `begin`, or -1. Where the pivot is
// not on the shelf and the tableau is large, the pass that forms it also forms the rows that are likely to come next.
template <class Team, class T>
SELBP_METHOD int Engine<Team, T>::take_from_shelf(int pivot, int& begin) {
  begin = 0;
  if constexpr (kLookahead > 0) {
    if (!work_.score) return -1;
    int place = 0;
    while (place < kShelf && shelf_pivot_[place] != pivot) ++place;
    if (place < kShelf) {
      ++shelf_used_;
    } else {
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

// Forms `pivot` and the best rows that are not on the shelf, in the places that were filled longest ago. A second row
// costs little where memory bounds the pass, more of them pay where most of what was shelved came to be used.
template <class Team, class T>
SELBP_METHOD int Engine<Team, T>::fill_shelf(int pivot) {
  const int count = 10 * shelf_used_ > 7 * shelf_formed_ ? kLookahead : 2;
  if (shelf_next_ + count > kShelf) shelf_next_ = 0;
  for (int other : shelf_pivot_)
    if (other >= 0) work_.score[other] = T(-1);
  int formed[kLookahead];
  for (int r = 0; r < count; ++r) {
    formed[r] = pivot;
    if (r > 0) {
      const Best<T> next = team_.argmax(
          shape_.main, shape_.main, [&](auto j, auto& vote) SELBP_INLINE_LAMBDA { vote.score = j.load(work_.score); });
      if (next.index >= 0) formed[r] = next.index;  // else the pivot once more: harmless
    }
    work_.score[formed[r]] = T(-1);
    shelf_pivot_[shelf_next_ + r] = formed[r];
    shelf_begin_[shelf_next_ + r] = rows_;
    for (int s = 0; s < rows_; ++s) work_.shelf_column[s * count + r] = -*work_.tableau.at(s, formed[r]);
  }
  const int place = shelf_next_;
  if (count == 2)
    form_rows<2>(formed, place);
  else
    form_rows<kLookahead>(formed, place);
  shelf_next_ += count;
  shelf_formed_ += count - 1;
  return place;
}

template <class Team, class T>
template <int count>
SELBP_METHOD void Engine<Team, T>::form_rows(const int* formed, int place) {
  constexpr int kLines = Team::kLookaheadLines / count;  // so that the sums fit in registers
  team_.template columns<kLines>(shape_.main, live_columns(), [&](auto j) SELBP_INLINE_LAMBDA {
    typename decltype(j)::Value sum[count];
    SELBP_UNROLL
    for (int r = 0; r < count; ++r) sum[r] = pivot_row(j, formed[r]);
    const int end = rows_;
    int s = first_row(j, 0);
    for (const T* columns = work_.shelf_column + s * count; s < end; ++s, columns += count) {
      const auto row = j.load(work_.tableau, s);
      SELBP_UNROLL
      for (int r = 0; r < count; ++r) sum[r] = fused(columns[r], row, sum[r]);
    }
    SELBP_UNROLL
    for (int r = 0; r < count; ++r) j.store(work_.shelf, place + r, sum[r]);
  });
  for (int j = live_columns(); j < shape_.count; ++j)  // slots that come into use later
    for (int r = 0; r < count; ++r) *work_.shelf.at(place + r, j) = T(0);
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
