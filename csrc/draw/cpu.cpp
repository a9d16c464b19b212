// One draw from the table, and one write to it, for one x86-64 level.
#include "draw/cpu.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

using Size = std::int64_t;
using Bits = std::uint64_t;

constexpr Bits kGolden = 0x9E3779B97F4A7C15u;

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
Bits mixed(Bits x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
  x = (x ^ x >> 27) * 0x94D049BB133111EBu;
  return x ^ x >> 31;
}

// Where the numbers of one (seed, step, stream) begin: they are SplitMix64's from there, one for each id.
Bits origin(Bits seed, Bits step, Bits stream) {
  return mixed(mixed(mixed(seed + kGolden) + step + kGolden) + stream + kGolden);
}

// Uniform on (0, 1): neither end, so that its logarithm is finite and not 0.
double uniform_of(Bits origin, Size id) {
  const Bits bits = mixed(origin + (static_cast<Bits>(id) + 1) * kGolden);
  return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
}

struct Entry {
  double key;
  Size row;
};

bool above(const Entry& a, const Entry& b) { return a.key > b.key || (a.key == b.key && a.row > b.row); }

void sift(Entry* heap, Size size, Size hole) {
  const Entry moved = heap[hole];
  for (Size child; (child = 2 * hole + 1) < size; hole = child) {
    child += child + 1 < size && above(heap[child + 1], heap[child]);
    if (!above(heap[child], moved)) break;
    heap[hole] = heap[child];
  }
  heap[hole] = moved;
}

// The rows of the `count` least keys, the least first; a row without a key is left out. Returns how many there were.
template <class Key>
Size least(Size pool, Size count, Entry* heap, Size* rows, const Key& key) {
  Size size = 0;
  if (count <= 0) return 0;
  for (Size row = 0; row < pool; ++row) {
    const Entry entry{key(row), row};
    if (entry.key < 0) continue;
    if (size < count) {
      heap[size++] = entry;
      if (size == count)
        for (Size hole = size / 2 - 1; hole >= 0; --hole) sift(heap, size, hole);
    } else if (above(heap[0], entry)) {
      heap[0] = entry;
      sift(heap, size, 0);
    }
  }
  if (size < count)
    for (Size hole = size / 2 - 1; hole >= 0; --hole) sift(heap, size, hole);
  for (Size last = size - 1; last >= 0; --last) {
    rows[last] = heap[0].row;
    heap[0] = heap[last];
    sift(heap, last, 0);
  }
  return size;
}

double hardness(double wrong, double power) {
  if (power == 0.5) return __builtin_sqrt(wrong);
  return power == 1.0 ? wrong : __builtin_pow(wrong, power);
}

// odds = responsibility * (1 - p)^power * factor + floor * mean; samples that are not known have the mean of the rest.
void find_odds(const DrawProblem& p) {
  double sum = 0, largest = 0;
  Size known = 0;
  for (Size row = 0; row < p.pool; ++row) {
    const Size id = p.ids[row];
    const double wrong = 1.0 - static_cast<double>(p.table.probability[id]);
    double odds = static_cast<double>(p.table.responsibility[id]) * hardness(wrong > 0 ? wrong : 0.0, p.power);
    if (!(wrong <= 1.0)) odds = __builtin_nan("");  // unknown
    if (p.factor) odds = p.table.label[id] < 0 ? __builtin_nan("") : odds * p.factor[p.table.label[id]];
    if (odds >= 0) {
      sum += odds;
      ++known;
      if (odds > largest) largest = odds;
    }
    p.odds[row] = odds;
  }
  const double mean = known ? sum / static_cast<double>(known) : 0.0;
  for (Size row = 0; row < p.pool; ++row) {
    const double odds = (p.odds[row] >= 0 ? p.odds[row] : mean) + p.floor * mean;
    p.odds[row] = !(largest > 0) ? 1.0 : odds > 1e-12 * largest ? odds : 1e-12 * largest;
  }
}

}  // namespace

void draw(const DrawProblem& p) {
  Entry* const heap = static_cast<Entry*>(p.scratch);
  const Bits first = origin(p.seed, p.step, 0), second = origin(p.seed, p.step, 1);
  if (p.uniform < p.k || p.draws) find_odds(p);
  least(p.pool, p.uniform, heap, p.rows, [&](Size row) { return uniform_of(first, p.ids[row]); });
  if (p.uniform >= p.k) return;
  for (Size i = 0; i < p.uniform; ++i) p.odds[p.rows[i]] = 0;
  if (p.draws) {
    for (Size row = 0; row < p.pool; ++row) p.draws[row] = uniform_of(second, p.ids[row]);
    p.draws[p.pool] = uniform_of(second, -1);
    return;
  }
  // The k greatest of log(odds) + Gumbel noise are those of the k least exponential draws over their odds.
  least(p.pool, p.k - p.uniform, heap, p.rows + p.uniform, [&](Size row) {
    return p.odds[row] > 0 ? -__builtin_log(uniform_of(second, p.ids[row])) / p.odds[row] : -1.0;
  });
}

namespace {

// p of the target and the most probable other class of one row. Where it is wanted, `out` gets all probabilities.
double probability_of(const float* z, Size classes, Size target, Size* rival, double* out) {
  float most = z[0];
  *rival = -1;
  for (Size c = 0; c < classes; ++c) {
    most = z[c] > most ? z[c] : most;
    if (c != target && (*rival < 0 || z[c] > z[*rival])) *rival = c;
  }
  double sum = 0;
  for (Size c = 0; c < classes; ++c) {
    const double e = __builtin_exp(static_cast<double>(z[c]) - most);
    if (out) out[c] = e;
    sum += e;
  }
  if (out)
    for (Size c = 0; c < classes; ++c) out[c] /= sum;
  return __builtin_exp(static_cast<double>(z[target]) - most) / sum;
}

// P(the label is right), from all probabilities by the transition, or from that of the label by epsilon.
double responsibility_of(const RecordProblem& p, double probability, Size target, const double* all) {
  if (!p.transition) {
    const double right = (1.0 - p.state[0]) * probability;
    const double sum = right + p.state[0] / static_cast<double>(p.classes);
    return sum > 0 ? right / sum : 1.0;
  }
  double sum = 0;
  for (Size c = 0; c < p.classes; ++c) sum += p.transition[c * p.classes + target] * all[c];
  return sum > 0 ? p.transition[target * p.classes + target] * probability / sum : 1.0;
}

struct Uniform {
  double rows = 0, wrong = 0, norm = 0, norm_sq = 0;
};

void remember(const RecordProblem& p, const Uniform& u) {
  if (!(u.rows > 0)) return;
  double mass = p.state[1] + u.rows;
  mass = mass < p.window ? mass : p.window;
  const double share = u.rows < mass ? u.rows / mass : 1.0;
  if (p.state[0] > 0) {  // at its own pace: a step of expectation-maximisation, which would stay at 0 for ever
    const double now = p.state[0] + (u.rows < p.window ? u.rows / p.window : 1.0) * (u.wrong / u.rows - p.state[0]);
    p.state[0] = now > 1e-3 ? now : 1e-3;
  }
  p.state[1] = mass;
  p.state[2] += share * (u.norm / u.rows - p.state[2]);
  p.state[3] += share * (u.norm_sq / u.rows - p.state[3]);
}

}  // namespace

// Returns the first row whose target is not the label that the table has of its sample, before anything is written; -1.
std::int64_t record(const RecordProblem& p) {
  const auto place_of = [&](Size row) { return p.place ? p.place[row] : row; };
  const auto counts = [&](Size row) {
    return (!p.live || p.live[row]) && p.target[row] >= 0 && p.target[row] < p.classes;
  };
  for (Size row = 0; row < p.rows; ++row) {
    const std::int32_t label = p.table.label[p.ids[place_of(row)]];
    if (counts(row) && label >= 0 && label != p.target[row]) return row;
  }
  Uniform u;
  for (Size row = 0; row < p.rows; ++row) {
    if (!counts(row)) continue;
    const Size id = p.ids[place_of(row)], target = p.target[row];
    Size rival;
    double* const all = p.transition ? p.scratch : nullptr;
    const double probability = probability_of(p.logits + row * p.stride, p.classes, target, &rival, all);
    if (!(probability >= 0)) continue;  // NaN
    const double right = responsibility_of(p, probability, target, all), norm = right * (1.0 - probability);
    p.table.probability[id] = static_cast<float>(probability);
    p.table.responsibility[id] = static_cast<float>(right);
    p.table.label[id] = static_cast<std::int32_t>(target);
    p.table.rival[id] = static_cast<std::int32_t>(rival);
    p.table.seen[id] = p.time;
    if (place_of(row) >= p.uniform) continue;
    u.rows += 1;
    u.wrong += 1.0 - right;
    u.norm += norm;
    u.norm_sq += norm * norm;
    if (!p.transition) continue;
    double sum = 0;
    for (Size c = 0; c < p.classes; ++c) sum += p.transition[c * p.classes + target] * all[c];
    const double share = 1.0 / p.window;
    for (Size c = 0; c < p.classes; ++c)
      for (Size given = 0; given < p.classes; ++given) {
        const double now = given == target && sum > 0 ? p.transition[c * p.classes + target] * all[c] / sum : 0.0;
        p.counts[c * p.classes + given] += share * (now - p.counts[c * p.classes + given]);
      }
  }
  remember(p, u);
  return -1;
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
