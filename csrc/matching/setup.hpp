// Part of engine.hpp: the scaled problem that the greedy loop starts from, and the answer that it leaves.
#pragma once

namespace selbp {
namespace SELBP_LEVEL {

// Scales the problem by powers of two (exactly), so that max diag K and ||y||^2 lie in [1, 4), and fills the columns.
template <class Team, class T>
SELBP_METHOD bool Engine<Team, T>::prepare() {
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
template <class Team, class T>
SELBP_METHOD double Engine<Team, T>::mean_diagonal() {
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

// What a slot without a row repeats where it must name one; every thread looks for itself.
template <class Team, class T>
SELBP_METHOD int Engine<Team, T>::spare_row(int count) const {
  if (count > 0) return work_.order[0];
  int row = 0;
  while (row < options_.n && problem_.valid && !problem_.valid[row]) ++row;
  return row < options_.n ? row : 0;
}

template <class Team, class T>
SELBP_METHOD void Engine<Team, T>::report(const Answer<T>& answer, Status status) {
  if (status != Status::invalid) {
    const Best<T> huge = team_.argmax(shape_.main, live_columns(), [&](auto j, auto& vote) SELBP_INLINE_LAMBDA {
      if (j.first < shape_.main) return;
      vote.spoiled = !(magnitude(j.load(work_.correlation)) * T(weight_scale_) <= Limits<T>::kMax);
    });
    if (huge.spoiled) status = Status::invalid;
  }
  const bool usable = status != Status::invalid;
  const int count = usable ? rows_ : 0;
  const int spare = options_.fill && options_.k > count ? spare_row(count) : -1;
  team_.each(options_.k, [&](int u) {
    answer.indices[u] = u < count ? work_.order[u] : spare;
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
template <class Team, class T>
SELBP_METHOD void Engine<Team, T>::quadratic_form(int count) {
  const double row_scale = double(row_scale_), target_scale = double(target_scale_);
  // z has served; from here on it holds the weights in the order of choice.
  team_.each(count, [&](int u) { work_.z[u] = -work_.correlation[work_.slot[u]]; });
  team_.sync();
  team_.each(count, [&](int u) {
    const T* gram = gram_row(work_.order[u]);
    auto term = [&](int s, double sum) { return fused(double(work_.z[s]), double(gram[work_.order[s]]), sum); };
    double sums[4] = {};  // one alone would wait for each addition
    int s = 0;
    for (; s + 4 <= u; s += 4) {
      SELBP_UNROLL
      for (int part = 0; part < 4; ++part) sums[part] = term(s + part, sums[part]);
    }
    for (; s < u; ++s) sums[0] = term(s, sums[0]);
    const double twice = 2.0 * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    const double w = double(work_.z[u]), inner = double(problem_.inner[work_.order[u]]);
    work_.partial[u] = w * (term(u, twice) * row_scale * row_scale - 2.0 * inner * row_scale * target_scale);
  });
  team_.sync();
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
