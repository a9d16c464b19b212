// Streaming loops for the roofline, built by benchmarks/stream.py: the compiler must neither skip a repeat nor turn the
// copy into memcpy, whose non-temporal stores would measure something that no kernel of ours does. Every thread has
// its own contiguous share.
#include <cstdint>

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

extern "C" {

// Reads `count` floats `repeats` times, and adds them up.
void selbp_stream_read(const float* source, std::int64_t count, int repeats, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int t = 0; t < n_threads; ++t) {
    const std::int64_t begin = count * t / n_threads, end = count * (t + 1) / n_threads;
    float part = 0;
    for (int r = 0; r < repeats; ++r) {
      forget(source);
      part += sum_once(source + begin, end - begin);
    }
    forget(&part);
  }
}

// Copies `count` floats `repeats` times.
void selbp_stream_copy(float* target, const float* source, std::int64_t count, int repeats, int n_threads) {
#pragma omp parallel for num_threads(n_threads) schedule(static)
  for (int t = 0; t < n_threads; ++t) {
    const std::int64_t begin = count * t / n_threads, end = count * (t + 1) / n_threads;
    volatile float one = 1.0f;
    for (int r = 0; r < repeats; ++r) {
      copy_once(target + begin, source + begin, end - begin, one);
      forget(target);
    }
  }
}

}  // extern "C"
