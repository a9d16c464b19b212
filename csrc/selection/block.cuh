// What one block does together on arrays in its shared memory: sort, scan, reduce. Every result is the same whatever
// order the threads run in: sums follow the positions, and an arg max takes the lowest position among equals.
#pragma once

#include "selection/selection.hpp"
#include "team/block_team.cuh"

namespace selbp {
namespace SELBP_LEVEL {

using Key = unsigned long long;
constexpr Key kNoKey = ~Key(0);
constexpr int kSelectThreads = 512;  // at most

SELBP_HD Key bits_of(double x) {
#if defined(__CUDACC__)
  return Key(__double_as_longlong(x));
#else
  Key bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

// Orders as the number does; both zeros are one. Finite numbers have keys above 0 and below kNoKey.
SELBP_HD Key key_of(double x) {
  const Key bits = bits_of(x + 0.0);
  return bits >> 63 ? ~bits : bits | Key(1) << 63;
}

SELBP_HD double read(const void* array, bool single, std::size_t i) {
  return single ? double(static_cast<const float*>(array)[i]) : static_cast<const double*>(array)[i];
}
SELBP_HD void write(void* array, bool single, std::size_t i, double value) {
  if (single)
    static_cast<float*>(array)[i] = float(value);
  else
    static_cast<double*>(array)[i] = value;
}
SELBP_HD bool is_finite(double x) { return magnitude(x) <= Limits<double>::kMax; }

// The greatest key and the lowest position that has it.
struct Leader {
  Key key;
  int at;
};
SELBP_HD Leader leading(Leader a, Leader b) {
  const bool second = b.key > a.key || (b.key == a.key && b.at < a.at);
  return second ? b : a;
}

class Block {
 public:
  // `room`: kRoom bytes of shared memory, 8-byte aligned.
  static constexpr std::size_t kRoom = (kSelectThreads + 1) * sizeof(double) + 2 * kWarp * 2 * sizeof(Key);

  SELBP_HD explicit Block(unsigned char* room)
      : totals_(reinterpret_cast<double*>(room)), ballots_(reinterpret_cast<Key*>(totals_ + kSelectThreads + 1)) {}

  SELBP_HD int thread() const { return int(threadIdx.x); }
  SELBP_HD int threads() const { return int(blockDim.x); }
  SELBP_HD void sync() const { __syncthreads(); }

  template <class F>
  SELBP_HD void each(int count, F f) const {
    for (int i = thread(); i < count; i += threads()) f(i);
  }

  // One barrier: every warp folds the warps' results for itself, from rooms that take turns.
  SELBP_HD Leader lead(Leader mine) {
    mine = lead_lanes(mine, kWarp);
    turn_ ^= 1;
    Key* const room = ballots_ + turn_ * 2 * kWarp;
    const int lane = thread() % kWarp, warps = threads() / kWarp;
    if (lane == 0) {
      room[thread() / kWarp] = mine.key;
      room[kWarp + thread() / kWarp] = Key(mine.at);
    }
    sync();
    return lead_lanes(lane < warps ? Leader{room[lane], int(room[kWarp + lane])} : Leader{0, -1}, kWarp);
  }

  // The position that leads, or 0 where none was proposed.
  SELBP_HD int first(Leader mine) {
    const int at = lead(mine).at;
    return at < 0 ? 0 : at;
  }

  // f(i, before) for each i, `before` being the sum of value(j) over j < i; returns the sum of all. Every thread takes
  // a run of neighbours, and the runs are added in their order.
  template <class V, class F>
  SELBP_HD double scan(int count, V value, F f) {
    const int run = (count + threads() - 1) / threads();
    const int first = thread() * run < count ? thread() * run : count;
    const int last = first + run < count ? first + run : count;
    double sum = 0;
    for (int i = first; i < last; ++i) sum += value(i);
    totals_[thread()] = sum;
    sync();
    if (thread() == 0) {
      double before = 0;
      for (int t = 0; t < threads(); ++t) {
        const double own = totals_[t];
        totals_[t] = before;
        before += own;
      }
      totals_[threads()] = before;
    }
    sync();
    double before = totals_[thread()];
    const double all = totals_[threads()];
    for (int i = first; i < last; ++i) {
      const double own = value(i);
      f(i, before);
      before += own;
    }
    sync();
    return all;
  }
  template <class V>
  SELBP_HD double sum(int count, V value) {
    return scan(count, value, [](int, double) {});
  }

  // Ascending by key, then by row; `size` is a power of two.
  SELBP_HD void sort(Key* keys, int* rows, int size) const {
    for (int span = 2; span <= size; span *= 2)
      for (int distance = span / 2; distance > 0; distance /= 2) {
        sync();
        each(size / 2, [&](int pair) {
          const int low = 2 * pair - (pair & (distance - 1)), high = low + distance;
          const bool after = keys[low] > keys[high] || (keys[low] == keys[high] && rows[low] > rows[high]);
          if (after == ((low & span) == 0)) {
            const Key key = keys[low];
            const int row = rows[low];
            keys[low] = keys[high];
            rows[low] = rows[high];
            keys[high] = key;
            rows[high] = row;
          }
        });
      }
    sync();
  }

 private:
  SELBP_HD Leader lead_lanes(Leader mine, int lanes) const {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const Key key = __shfl_xor_sync(kAllLanes, mine.key, distance);
      const int at = __shfl_xor_sync(kAllLanes, mine.at, distance);
      mine = leading(mine, Leader{key, at});
    }
    return mine;
  }

  double* totals_;
  Key* ballots_;
  int turn_ = 0;
};

// Two arrays of n numbers or keys and one of n rows, in shared memory; `size` is n or the next power of two.
struct Columns {
  double *a, *b;
  int* rows;
  int size;

  SELBP_HD Columns(unsigned char* memory, int n) : size(1) {
    while (size < n) size *= 2;
    a = reinterpret_cast<double*>(memory);
    b = a + size;
    rows = reinterpret_cast<int*>(b + size);
  }
  SELBP_HD Key* keys(double* array) const { return reinterpret_cast<Key*>(array); }
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
