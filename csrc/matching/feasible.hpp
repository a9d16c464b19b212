// Part of engine.hpp: Lawson and Hanson's inner loop and the removal of a row.
#pragma once

namespace selbp {
namespace SELBP_LEVEL {

// Walks from the weights before the last append to those after it until the first reaches 0, drops that row, again.
template <class Team, class T>
SELBP_METHOD void Engine<Team, T>::make_feasible() {
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

template <class Team, class T>
SELBP_HD int Engine<Team, T>::row_of_slot(int slot) const {
  int row = 0;
  while (work_.slot[row] != slot) ++row;
  return row;
}

template <class Team, class T>
SELBP_METHOD void Engine<Team, T>::remove(int row) {
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
template <class Team, class T>
SELBP_HD void Engine<Team, T>::rotations(int row, int slot) {
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

}  // namespace SELBP_LEVEL
}  // namespace selbp
