// Choosing rows for one x86-64 level: what takes torch sixty small operators is a few passes over n numbers here.
#include "choose_rows/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

using Size = std::int64_t;

struct Item {
  std::uint64_t key;
  Size row;
};

// Orders as the number does; both zeros are one.
std::uint64_t key_of(double x) {
  const double plain = x + 0.0;
  std::uint64_t bits;
  __builtin_memcpy(&bits, &plain, sizeof bits);
  return bits >> 63 ? ~bits : bits | std::uint64_t(1) << 63;
}

// Sorts upward, equal keys as they came, digit by digit. Returns the one of the two arrays that holds the result.
const Item* sorted(Item* items, Item* spare, Size count) {
  Size begin[8][256] = {};
  for (Size i = 0; i < count; ++i)
    for (int digit = 0; digit < 8; ++digit) ++begin[digit][items[i].key >> 8 * digit & 255];
  for (int digit = 0; digit < 8 && count; ++digit) {
    if (begin[digit][items[0].key >> 8 * digit & 255] == count) continue;  // all alike
    Size sum = 0;
    for (Size& bucket : begin[digit]) {
      const Size size = bucket;
      bucket = sum;
      sum += size;
    }
    for (Size i = 0; i < count; ++i) spare[begin[digit][items[i].key >> 8 * digit & 255]++] = items[i];
    Item* const swap = items;
    items = spare;
    spare = swap;
  }
  return items;
}

// probability[row] = min(1, c odds), with the sum k or the number of positive odds. `items` are in ascending order of
// the odds, (count,) each, as the ascending sums are: those that reach 1 are the last ones.
void inclusion(const Item* items, const double* odds, double* sums, Size count, Size k, double* probability) {
  double sum = 0;
  for (Size i = 0; i < count; ++i) sums[i] = sum += odds[i];
  Size last = count - 1, slots = k;
  while (last >= 0 && static_cast<double>(slots) * odds[last] > sums[last]) {
    --last;
    --slots;
  }
  const double scale = last < 0 ? 0.0 : static_cast<double>(slots) / sums[last];
  for (Size i = 0; i < count; ++i) {
    const double scaled = scale * odds[i];
    if (odds[i] > 0) probability[items[i].row] = i > last || !(scaled < 1.0) ? 1.0 : scaled;
  }
}

// Systematic sampling in the order of the draws: rows that are not drawn get probability 0.
void systematic(const ChooseProblem& p, double* probability, Item* items, Item* spare) {
  Size count = 0;
  double sum = 0;
  for (Size row = 0; row < p.n; ++row) {
    if (!(probability[row] > 0 && probability[row] < 1)) continue;
    items[count++] = {key_of(p.draws[row]), row};
    sum += probability[row];
  }
  const Item* const order = sorted(items, spare, count);
  const double total = __builtin_floor(sum + 0.5), offset = p.draws[p.n];  // an integer up to rounding: made one
  double end = 0, edge = 0;
  for (Size i = 0; i < count; ++i) end += probability[order[i].row];
  double before = __builtin_floor(-offset);
  for (Size i = 0; i < count; ++i) {
    double& mine = probability[order[i].row];
    edge += mine;
    const double now = __builtin_floor(edge / end * total - offset);
    if (!(now > before)) mine = 0;
    before = now;
  }
}

double weight_of(const ChooseProblem& p, Size valid, Size chosen, double probability) {
  const double n = static_cast<double>(p.n);
  if (p.mode == SlotWeights::unbiased) return 1.0 / (n * probability);
  return p.mode == SlotWeights::batch ? 1.0 / n : static_cast<double>(valid) / (n * static_cast<double>(chosen));
}

}  // namespace

void choose_rows(const ChooseProblem& p) {
  Item* const items = reinterpret_cast<Item*>(p.scratch);
  Item* const spare = items + p.n;
  double* const probability = p.scratch + 4 * p.n;
  double* const odds = probability + p.n;
  const bool top = p.rule == ChooseRule::top;
  Size eligible = 0, valid = 0, chosen = 0;
  for (Size row = 0; row < p.n; ++row) {
    probability[row] = 0;
    valid += p.valid[row] != 0;
    if (!p.valid[row] || !__builtin_isfinite(p.score[row])) continue;
    const std::uint64_t key = key_of(p.score[row]);
    items[eligible++] = {top ? ~key : key, row};
  }
  const Item* const order = sorted(items, spare, eligible);
  if (top) {
    for (; chosen < p.k && chosen < eligible; ++chosen) p.indices[chosen] = order[chosen].row;
  } else {
    const double all = static_cast<double>(eligible), power = all / static_cast<double>(p.k) - 1.0;
    for (Size i = 0; i < eligible; ++i) {
      const double score = p.score[order[i].row];
      odds[i] = p.rule == ChooseRule::odds ? (score > 0 ? score : 0.0)
                                           : __builtin_pow((static_cast<double>(i) + 0.5) / all, power > 0 ? power : 0);
    }
    inclusion(order, odds, odds + p.n, eligible, p.k, probability);
    systematic(p, probability, items, spare);
    for (Size row = 0; row < p.n && chosen < p.k; ++row)
      if (probability[row] > 0) p.indices[chosen++] = row;
  }
  for (Size slot = 0; slot < p.k; ++slot) {
    if (slot >= chosen) p.indices[slot] = chosen ? p.indices[0] : 0;
    p.weights[slot] = slot < chosen ? weight_of(p, valid, chosen, probability[p.indices[slot]]) : 0.0;
  }
}

void percentile(const PercentileProblem& p) {
  Item* const items = reinterpret_cast<Item*>(p.scratch);
  Size free = p.length, known = 0;  // filled from the end: the newest losses first
  for (Size i = p.n - 1; i >= 0 && free > 0; --i)
    if (__builtin_isfinite(p.loss[i])) p.next[--free] = p.loss[i];
  for (Size i = p.length - 1; i >= 0 && free > 0; --i)
    if (__builtin_isfinite(p.history[i])) p.next[--free] = p.history[i];
  known = p.length - free;
  while (free > 0) p.next[--free] = __builtin_nan("");
  for (Size i = 0; i < known; ++i) items[i] = {key_of(p.next[p.length - known + i]), i};
  const Item* const ranked = sorted(items, items + p.length, known);
  for (Size i = 0; i < p.n; ++i) {
    const std::uint64_t key = key_of(__builtin_isfinite(p.loss[i]) ? p.loss[i] : 0.0);
    Size low = 0, high = known;
    while (low < high) {
      const Size middle = (low + high) / 2;
      if (ranked[middle].key < key)
        low = middle + 1;
      else
        high = middle;
    }
    p.share[i] = known ? static_cast<double>(low) / static_cast<double>(known) : 0.0;
  }
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
