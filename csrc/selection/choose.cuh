// Choosing k rows by rank, or at random with known inclusion probabilities, by one block. The same steps as
// csrc/choose_rows/cpu.cpp; sums are taken in runs, so that probabilities may differ from the CPU's in their last bits.
#pragma once

#include "selection/block.cuh"

namespace selbp {
namespace SELBP_LEVEL {

using selection::Rule;
using selection::Weights;

SELBP_HD double slot_weight(Weights mode, int n, int valid, int chosen, double probability) {
  if (mode == Weights::unbiased) return 1.0 / (double(n) * probability);
  return mode == Weights::batch ? 1.0 / double(n) : double(valid) / (double(n) * double(chosen));
}

// c.rows: the eligible rows by their score, equal ones as they come. Returns their number.
template <class E, class S>
SELBP_HD int ranked(Block& block, const Columns& c, int n, bool downward, E eligible, S score) {
  Key* const keys = c.keys(c.a);
  block.each(c.size, [&](int row) {
    const bool in = row < n && eligible(row);
    const Key key = in ? key_of(score(row)) : kNoKey;
    keys[row] = in && downward ? ~key : key;
    c.rows[row] = row;
  });
  const int count = int(block.sum(n, [&](int row) { return eligible(row) ? 1.0 : 0.0; }));
  block.sort(keys, c.rows, c.size);
  return count;
}

// c.a[row] = min(1, s odds), with the sum k or the number of positive odds; odds(i) is that of c.rows[i], ascending.
template <class O>
SELBP_HD void inclusion(Block& block, const Columns& c, int n, int count, int k, O odds) {
  block.each(count, [&](int i) { c.b[i] = odds(i); });
  block.sync();
  block.scan(count, [&](int i) { return c.b[i]; }, [&](int i, double before) { c.a[i] = before + c.b[i]; });
  Leader mine{0, -1};  // the last row that does not reach 1: its key is its place, and 1
  block.each(count, [&](int i) {
    if (!(double(k - (count - 1 - i)) * c.b[i] > c.a[i])) mine = leading(mine, Leader{Key(i) + 1, i});
  });
  const int last = int(block.lead(mine).key) - 1;
  const double scale = last < 0 ? 0.0 : double(k - (count - 1 - last)) / c.a[last];
  block.sync();
  block.each(n, [&](int row) { c.a[row] = 0; });
  block.sync();
  block.each(count, [&](int i) {
    const double own = c.b[i], scaled = scale * own;
    if (own > 0) c.a[c.rows[i]] = i > last || !(scaled < 1.0) ? 1.0 : scaled;
  });
  block.sync();
}

// Systematic sampling in the order of the draws: c.a[row] of a row that is not drawn becomes 0.
SELBP_HD void systematic(Block& block, const Columns& c, int n, const double* draws) {
  Key* const keys = c.keys(c.b);
  const auto inside = [&](int row) { return c.a[row] > 0 && c.a[row] < 1; };
  block.each(c.size, [&](int row) {
    keys[row] = row < n && inside(row) ? key_of(draws[row]) : kNoKey;
    c.rows[row] = row;
  });
  const int count = int(block.sum(n, [&](int row) { return inside(row) ? 1.0 : 0.0; }));
  block.sort(keys, c.rows, c.size);
  block.scan(
      count, [&](int i) { return c.a[c.rows[i]]; }, [&](int i, double before) { c.b[i] = before + c.a[c.rows[i]]; });
  if (count == 0) return;
  const double end = c.b[count - 1], total = floor(end + 0.5);  // an integer up to rounding: made one
  const double offset = draws[n];
  block.each(count, [&](int i) {
    const double before = i ? c.b[i - 1] / end * total : 0.0;
    if (!(floor(c.b[i] / end * total - offset) > floor(before - offset))) c.a[c.rows[i]] = 0;
  });
  block.sync();
}

// Writes the rows with in(row), ascending, at most k of them, into c.rows; returns how many.
template <class F>
SELBP_HD int gathered(Block& block, const Columns& c, int n, int k, F in) {
  const double all = block.scan(
      n, [&](int row) { return in(row) ? 1.0 : 0.0; },
      [&](int row, double before) {
        if (in(row) && int(before) < k) c.rows[int(before)] = row;
      });
  return int(all) < k ? int(all) : k;
}

// The first `chosen` of c.rows, then the first again, of weight 0; probability(row) where the weights are unbiased.
template <class P>
SELBP_HD void deliver(Block& block, const Columns& c, int n, int k, int chosen, int valid, Weights mode, bool single,
                      std::int64_t* indices, void* weights, P probability) {
  block.each(k, [&](int slot) {
    const int row = slot < chosen ? c.rows[slot] : chosen ? c.rows[0] : 0;
    indices[slot] = row;
    write(weights, single, std::size_t(slot),
          slot < chosen ? slot_weight(mode, n, valid, chosen, probability(row)) : 0.0);
  });
}

// Rule `norm`: whether rows are drawn by their norm; the running mean of tau is written.
template <class E, class S>
SELBP_HD bool by_norm(Block& block, const selection::Choose& p, E eligible, S score) {
  const double total = block.sum(p.n, [&](int row) { return eligible(row) ? score(row) : 0.0; });
  const double count = block.sum(p.n, [&](int row) { return eligible(row) ? 1.0 : 0.0; });
  const bool any = total > 0;
  const double least = 2.2250738585072014e-308, sum = any ? total : count;  // all alike where no norm is above 0
  const double squares = block.sum(p.n, [&](int row) {
    const double share = eligible(row) ? (any ? score(row) : 1.0) / (sum > least ? sum : least) : 0.0;
    return share * share;
  });
  const double tau = sqrt(count * squares), running = tau + p.momentum * (*p.before - tau);
  if (block.thread() == 0) *p.after = running;
  return any && (p.threshold < 0 || running > p.threshold);
}

// Rule `percentile`: appends the valid rows' finite losses to the last ones and keeps `length` of them, with NaN in
// front if there are fewer. Then sets every row's odds, 0 for a row without such a loss.
template <class L>
SELBP_HD void by_percentile(Block& block, const selection::Choose& p, const Columns& c, L loss) {
  const auto seen = [&](int i) { return i < p.length ? p.before[i] : loss(i - p.length); };
  const auto counts = [&](int i) { return is_finite(seen(i)) ? 1.0 : 0.0; };
  const int all = p.length + p.n, finite = int(block.sum(all, counts));
  const int known = finite < p.length ? finite : p.length;
  Key* const keys = c.keys(c.a);
  block.each(c.size, [&](int i) {
    keys[i] = kNoKey;
    c.rows[i] = i;
  });
  block.each(p.length - known, [&](int i) { p.after[i] = Limits<double>::kNaN; });
  block.sync();
  block.scan(all, counts, [&](int i, double before) {
    const int place = p.length - finite + int(before);
    if (!is_finite(seen(i)) || place < 0) return;
    p.after[place] = seen(i);
    keys[place] = key_of(seen(i));
  });
  block.sort(keys, c.rows, c.size);
  block.each(p.n, [&](int row) {
    const double own = loss(row);
    int below = 0, end = known;  // how many are less than the own one
    while (below < end) {
      const int middle = (below + end) / 2;
      if (keys[middle] < key_of(own))
        below = middle + 1;
      else
        end = middle;
    }
    const double odds = pow(double(below) / double(known > 1 ? known : 1), p.power);
    p.odds[row] = !is_finite(own) ? 0.0 : odds < p.least ? p.least : odds;
  });
  block.sync();
}

SELBP_HD void choose(const selection::Choose& p, unsigned char* shared) {
  Block block(shared);
  const bool norm = p.rule == Rule::norm, percentile = p.rule == Rule::percentile;
  const Columns c(shared + Block::kRoom, percentile && p.length > p.n ? p.length : p.n);
  if (percentile)
    by_percentile(block, p, c, [&](int row) {
      return p.valid[row] ? read(p.score, p.single_score != 0, std::size_t(row)) : Limits<double>::kNaN;
    });
  const auto score = [&](int row) {
    const std::size_t i = std::size_t(row);
    if (p.single_score && norm) {  // rounded as torch's operators round
      const float own = static_cast<const float*>(p.score)[i];
      return double(square_root(p.second ? own * static_cast<const float*>(p.second)[i] : own));
    }
    if (percentile) return p.odds[i];
    const double own = read(p.score, p.single_score != 0, i);
    return !norm ? own : square_root(p.second ? own * static_cast<const double*>(p.second)[i] : own);
  };
  const auto eligible = [&](int row) { return p.valid[row] != 0 && is_finite(score(row)); };
  const int valid = int(block.sum(p.n, [&](int row) { return p.valid[row] ? 1.0 : 0.0; }));
  const bool alike = norm && !by_norm(block, p, eligible, score);
  const int count =
      ranked(block, c, p.n, p.rule == Rule::top, eligible, [&](int row) { return alike ? 1.0 : score(row); });
  int chosen = count < p.k ? count : p.k;
  if (p.rule != Rule::top) {
    const double all = double(count), power = all / double(p.k) - 1.0;
    inclusion(block, c, p.n, count, p.k, [&](int i) {
      if (p.rule == Rule::rank) return pow((double(i) + 0.5) / all, power > 0 ? power : 0.0);
      const double own = alike ? 1.0 : score(c.rows[i]);
      return own > 0 ? own : 0.0;
    });
    systematic(block, c, p.n, p.draws);
    chosen = gathered(block, c, p.n, p.k, [&](int row) { return c.a[row] > 0; });
    block.sync();
  }
  deliver(block, c, p.n, p.k, chosen, valid, p.mode, p.single_weights != 0, p.indices, p.weights,
          [&](int row) { return c.a[row]; });
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
