// A randomised matching pursuit by one block: selbp/reference/sampling.py's `choose_diverse`, step by step.
#pragma once

#include "selection/choose.cuh"

namespace selbp {
namespace SELBP_LEVEL {

SELBP_HD double at_least(double x, double least) { return x < least ? least : x; }  // NaN stays NaN

SELBP_HD void diverse(const selection::Diverse& p, unsigned char* shared) {
  Block block(shared);
  const bool single = p.single != 0;
  const std::size_t n = std::size_t(p.n);
  // Of each row: e . g, |g|^2 outside the span of the rows drawn, what counts as spent, and 1 while it is free.
  double* const columns = p.scratch;  // of the Cholesky factor, one a draw
  double *const inner = columns + std::size_t(p.k) * n, *const distance = inner + n;
  double *const spent = distance + n, *const free = spent + n;
  const double target_sq = read(p.target_sq, single, 0);
  const auto own_sq = [&](int j) { return read(p.gram, single, std::size_t(j) * n + std::size_t(j)); };
  block.each(p.n, [&](int j) {
    inner[j] = read(p.inner, single, std::size_t(j));
    distance[j] = own_sq(j);
    spent[j] = p.noise * square_root(at_least(own_sq(j), 0.0) * target_sq);
    free[j] = p.valid[j] ? 1.0 : 0.0;
  });
  const int valid = int(block.sum(p.n, [&](int j) { return p.valid[j] ? 1.0 : 0.0; }));
  const int chosen = valid < p.k ? valid : p.k;
  int first = 0;
  for (int step = 0; step < chosen; ++step) {
    Leader mine{0, -1};
    block.each(p.n, [&](int j) {
      if (free[j] == 0) return;
      // The arg max of log odds + Gumbel noise is a draw with those odds; log odds of -1e3 lose to any others.
      const double uniform = p.draws[std::size_t(step) * n + std::size_t(j)], size = magnitude(inner[j]);
      const double noise = -log(-log(at_least(uniform, 1e-300)));
      const double odds = size > spent[j] ? size : 0.0;
      mine = leading(mine, Leader{key_of((odds > 0 ? log(at_least(odds, 1e-300)) : -1e3) + noise), j});
    });
    const int pick = block.lead(mine).at;
    if (step == 0) first = pick;
    const double pivot_sq = distance[pick], aligned = inner[pick];
    const double scale = pivot_sq > p.noise * own_sq(pick) ? 1.0 / square_root(at_least(pivot_sq, 1e-300)) : 0.0;
    block.sync();
    block.each(p.n, [&](int j) {
      double sum = 0;
      for (int s = 0; s < step; ++s)
        sum = fused(columns[std::size_t(s) * n + std::size_t(pick)], columns[std::size_t(s) * n + std::size_t(j)], sum);
      const double column = (read(p.gram, single, std::size_t(pick) * n + std::size_t(j)) - sum) * scale;
      columns[std::size_t(step) * n + std::size_t(j)] = column;
      inner[j] -= aligned * scale * column;
      distance[j] -= column * column;
      if (j == pick) free[j] = 0;
    });
    if (block.thread() == 0) {
      p.indices[step] = pick;
      write(p.weights, p.single_weights != 0, std::size_t(step), slot_weight(p.mode, p.n, valid, chosen, 0.0));
    }
    block.sync();
  }
  block.each(p.k - chosen, [&](int i) {
    p.indices[chosen + i] = first;
    write(p.weights, p.single_weights != 0, std::size_t(chosen + i), 0.0);
  });
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
