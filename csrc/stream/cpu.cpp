// Streaming kernels for the roofline: the compiler must neither skip a repeat nor turn the copy into memcpy, whose
// non-temporal stores would measure something that no kernel of ours does.
#include "stream/cpu.hpp"

#include "cpu/parallel.hpp"

namespace selbp {
namespace SELBP_LEVEL {
namespace {

constexpr int kLanes = 128;  // independent partial sums: enough to hide the latency of an addition on any vector width

float sum_once(const float* source, std::int64_t count) {
  float lanes[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += source[i + l];
  for (; i < count; ++i) lanes[0] += source[i];
  float total = 0;
  for (int l = 0; l < kLanes; ++l) total += lanes[l];
  return total;
}

void copy_once(float* target, const float* source, std::int64_t count, float one) {
  for (std::int64_t i = 0; i < count; ++i) target[i] = source[i] * one;
}

inline void forget(const void* pointer) { asm volatile("" : : "r"(pointer) : "memory"); }

}  // namespace

float stream_read(const float* source, std::int64_t count, int repeats, int n_threads) {
  float total = 0;
  parallel_for(n_threads, n_threads, 0, [&](std::int64_t t) {
    const std::int64_t begin = count * t / n_threads, end = count * (t + 1) / n_threads;
    float part = 0;
    for (int r = 0; r < repeats; ++r) {
      forget(source);
      part += sum_once(source + begin, end - begin);
    }
    if (t == 0) total = part;  // nobody reads the sum: one part keeps the reads from being optimised away
    forget(&part);
  });
  return total;
}

void stream_copy(float* target, const float* source, std::int64_t count, int repeats, int n_threads) {
  parallel_for(n_threads, n_threads, 0, [&](std::int64_t t) {
    const std::int64_t begin = count * t / n_threads, end = count * (t + 1) / n_threads;
    volatile float one = 1.0f;
    for (int r = 0; r < repeats; ++r) {
      copy_once(target + begin, source + begin, end - begin, one);
      forget(target);
    }
  });
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
