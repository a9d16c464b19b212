// A draw that is balanced on products with combinations of all rows, by one block: inclusion probabilities, the sketch,
// and the cube method as csrc/cube/cpu.cpp walks it. The direction of a step comes from Gauss and Jordan's elimination,
// which needs no substitution backward, one unit after another.
#pragma once

#include "selection/choose.cuh"

namespace selbp {
namespace SELBP_LEVEL {

constexpr double kRank = 1e-10;    // what elimination leaves of a row that depends on those before it
constexpr double kDecided = 1e-9;  // rounding distance from a face

SELBP_HD bool decided(double probability) { return probability <= kDecided || probability >= 1 - kDecided; }

// What a step works on, m = q + 1 units of the group.
struct Walk {
  double* matrix;                  // (q, m)
  double *direction, *size, *pi0;  // (m,): the walk's, the greatest entry of each row, the probabilities at the start
  int *group, *columns;            // (m,): the units, and the columns in the order of their pivots
};

// direction (m,), not 0, with matrix direction = 0. The matrix is overwritten.
SELBP_HD void null_vector(Block& block, const Walk& w, int q) {
  const int m = q + 1;
  block.each(m, [&](int j) { w.columns[j] = j; });
  int rank = 0;
  for (int row = 0; row < q; ++row) {
    block.sync();
    const double* const current = w.matrix + std::size_t(row) * m;
    Leader mine{0, -1};
    block.each(m - rank, [&](int i) {
      const double size = magnitude(current[w.columns[rank + i]]);
      if (size > 0) mine = leading(mine, Leader{bits_of(size), rank + i});  // the bits of what is above 0 order as it
    });
    const int best = block.lead(mine).at;
    if (best < 0 || !(magnitude(current[w.columns[best]]) > kRank * w.size[row])) continue;
    const int column = w.columns[best];
    const double scale = 1.0 / current[column];
    block.sync();
    if (block.thread() == 0) {
      w.columns[best] = w.columns[rank];
      w.columns[rank] = column;
    }
    double* const kept = w.matrix + std::size_t(rank) * m;  // row >= rank: what stood there is used up
    block.each(m, [&](int j) { w.direction[j] = current[j] * scale; });
    block.sync();
    block.each(q * m, [&](int i) {  // every other row loses its entry in the column; the factor is read before
      const int r = i / m, j = i % m;
      if ((r < rank || r > row) && j != column) {
        double& entry = w.matrix[i];
        entry -= w.matrix[std::size_t(r) * m + column] * w.direction[j];
      }
    });
    block.sync();
    block.each(q, [&](int r) {
      if (r < rank || r > row) w.matrix[std::size_t(r) * m + column] = 0;
    });
    block.each(m, [&](int j) { kept[j] = w.direction[j]; });
    ++rank;
  }
  block.sync();
  block.each(m, [&](int s) {
    const int free = w.columns[rank];
    w.direction[w.columns[s]] = s < rank ? -w.matrix[std::size_t(s) * m + free] : s == rank ? 1.0 : 0.0;
  });
  block.sync();
}

// How far the point goes along the direction, which is scaled to a greatest entry of 1 and a sign of its own.
SELBP_HD double move_of(Block& block, const Walk& w, const double* pi, int m, double draw) {
  Leader most{0, -1}, lead{0, -1}, ahead{0, -1}, behind{0, -1};
  block.each(m, [&](int j) { most = leading(most, Leader{bits_of(magnitude(w.direction[j])), j}); });
  const double largest = magnitude(w.direction[block.first(most)]);
  block.each(m, [&](int j) {
    if (magnitude(w.direction[j]) > 1e-9 * largest) lead = leading(lead, Leader{1, j});
  });
  const double sign = w.direction[block.first(lead)] > 0 ? 1 : -1;
  block.sync();
  block.each(m, [&](int j) { w.direction[j] *= sign / largest; });
  block.sync();
  const auto way = [&](int j, bool up) {  // to the face that unit j meets
    const double u = w.direction[j], p = pi[w.group[j]];
    return (up == (u > 0) ? 1 - p : p) / magnitude(u);
  };
  block.each(m, [&](int j) {
    if (magnitude(w.direction[j]) <= 1e-14) return;
    ahead = leading(ahead, Leader{~bits_of(way(j, true)), j});  // the least has the greatest complement
    behind = leading(behind, Leader{~bits_of(way(j, false)), j});
  });
  const double up = way(block.first(ahead), true), down = way(block.first(behind), false);
  return draw * (up + down) < down ? up : -down;
}

// pi[unit] becomes 1 for the units of the sample and 0 for the others.
SELBP_HD void cube(Block& block, const selection::Balanced& p, const Walk& w, double* pi, const int* order) {
  const int most = p.p + 1;
  int count = 0, next = 0;  // every thread keeps its own, all alike
  for (int step = 0; step < p.n; ++step) {
    const int before = count;
    for (; count <= most && next < p.n; ++next) {
      const int unit = order[next];
      if (decided(pi[unit])) continue;  // rounded at the end
      if (block.thread() == 0) {
        w.pi0[count] = pi[unit];
        w.group[count] = unit;
      }
      ++count;
    }
    if (count < 2) break;
    if (count > before) block.sync();
    const int q = count - 1 < most ? count - 1 : most, m = q + 1;
    block.each(q * m, [&](int i) {
      const int c = i / m, j = i % m;
      w.matrix[i] = c == 0 ? 1.0 : p.sketch[std::size_t(w.group[j]) * std::size_t(p.p) + std::size_t(c - 1)] / w.pi0[j];
    });
    block.sync();
    block.each(q, [&](int c) {
      double size = 0;
      for (int j = 0; j < m; ++j) {
        const double own = magnitude(w.matrix[std::size_t(c) * m + j]);
        size = own > size ? own : size;
      }
      w.size[c] = size;
    });
    null_vector(block, w, q);
    const double move = move_of(block, w, pi, m, p.draws[std::size_t(p.n) + std::size_t(step)]);
    block.sync();
    block.each(m, [&](int j) { pi[w.group[j]] += move * w.direction[j]; });
    block.sync();
    int left = 0;
    for (int j = 0; j < count; ++j)
      if (!decided(pi[w.group[j]])) ++left;
    block.sync();
    if (block.thread() == 0) {
      int place = 0;
      for (int j = 0; j < count; ++j) {
        if (decided(pi[w.group[j]])) continue;
        w.pi0[place] = w.pi0[j];
        w.group[place++] = w.group[j];
      }
    }
    block.sync();
    count = left;
  }
  block.sync();
  block.each(p.n, [&](int unit) { pi[unit] = pi[unit] < 0.5 ? 0 : 1; });
  block.sync();
}

// Column 0: products with the mean of the eligible rows; the others: with the mixture's combinations of them.
template <class E>
SELBP_HD void sketched(Block& block, const selection::Balanced& p, E eligible) {
  block.each(p.n * p.p, [&](int i) {
    const int row = i / p.p, column = i % p.p;
    double sum = 0;
    for (int j = 0; j < p.n && eligible(row); ++j) {
      if (!eligible(j)) continue;
      const double entry = read(p.gram, p.single_gram != 0, std::size_t(row) * std::size_t(p.n) + std::size_t(j));
      const double weight = column == 0 ? 1.0 / double(p.n) : p.mixture[std::size_t(j) * (p.p - 1) + (column - 1)];
      sum = fused(is_finite(entry) ? entry : 0.0, weight, sum);
    }
    p.sketch[i] = sum;
  });
}

// Shared memory: Block::kRoom, the columns, probabilities (2, n), three arrays of the walk (p + 2), and the order (n,)
// and the group (2, p + 2) as int.
SELBP_HD void balanced(const selection::Balanced& p, unsigned char* shared) {
  Block block(shared);
  unsigned char* const memory = shared + Block::kRoom;
  const Columns c(memory, p.n);
  double* const first = reinterpret_cast<double*>(c.rows + (c.size < 2 ? 2 : c.size));
  double* const pi = first + p.n;
  const int width = p.p + 2;
  double* const walk = pi + p.n;
  int* const order = reinterpret_cast<int*>(walk + 3 * width);
  int* const group = order + p.n;
  const auto squared = [&](int row) {
    return read(p.gram, p.single_gram != 0, std::size_t(row) * std::size_t(p.n) + std::size_t(row));
  };
  const auto eligible = [&](int row) { return p.valid[row] != 0 && is_finite(squared(row)); };
  const auto norm = [&](int row) { return squared(row) > 0 ? square_root(squared(row)) : 0.0; };
  const bool any = p.by_norm && block.sum(p.n, [&](int row) { return eligible(row) ? norm(row) : 0.0; }) > 0;
  const auto odds = [&](int row) { return any ? norm(row) : 1.0; };
  sketched(block, p, eligible);
  const int valid = int(block.sum(p.n, [&](int row) { return p.valid[row] ? 1.0 : 0.0; }));
  const int count = ranked(block, c, p.n, false, eligible, odds);
  inclusion(block, c, p.n, count, p.k, [&](int i) { return odds(c.rows[i]); });
  block.each(p.n, [&](int row) { first[row] = pi[row] = c.a[row]; });
  block.sync();
  ranked(block, c, p.n, false, [](int) { return true; }, [&](int row) { return p.draws[row]; });
  block.each(p.n, [&](int i) { order[i] = c.rows[i]; });
  block.sync();
  double* const room = p.matrix ? p.matrix : c.a;  // both columns and more: the sort is over
  cube(block, p, {room, walk, walk + width, walk + 2 * width, group, group + width}, pi, order);
  const int chosen = gathered(block, c, p.n, p.k, [&](int row) { return pi[row] > 0.5; });
  deliver(block, c, p.n, p.k, chosen, valid, Weights::unbiased, p.single_weights != 0, p.indices, p.weights,
          [&](int row) { return first[row]; });
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
