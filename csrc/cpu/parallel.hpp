// Loops over the threads of libgomp, the OpenMP runtime that torch has loaded, whichever compiler builds this file.
//
// `#pragma omp` would not do: clang compiles it to calls of its own runtime, libomp, and a process that has both keeps
// two pools of threads. GOMP_parallel is what GCC itself compiles a parallel region to.
#pragma once

#include <cstdint>

extern "C" {
void GOMP_parallel(void (*region)(void*), void* data, unsigned n_threads, unsigned flags);
int omp_get_thread_num(void);
int omp_get_num_threads(void);
}

namespace selbp {
namespace SELBP_LEVEL {

// body(i) for each i in [0, count), on at most n_threads threads. chunk > 0: a thread takes the next `chunk` indices
// when it is free; 0: every thread has one contiguous part.
template <class Body>
void parallel_for(std::int64_t count, int n_threads, std::int64_t chunk, const Body& body) {
  if (n_threads <= 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct Region {
    std::int64_t count, chunk, next;
    const Body& body;
    static void run(void* data) {
      Region& region = *static_cast<Region*>(data);
      const std::int64_t count = region.count, chunk = region.chunk;
      if (chunk == 0) {
        const std::int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const std::int64_t last = count * (thread + 1) / threads;
        for (std::int64_t i = count * thread / threads; i < last; ++i) region.body(i);
        return;
      }
      for (;;) {
        const std::int64_t first = __atomic_fetch_add(&region.next, chunk, __ATOMIC_RELAXED);
        if (first >= count) return;
        const std::int64_t last = count - first < chunk ? count : first + chunk;
        for (std::int64_t i = first; i < last; ++i) region.body(i);
      }
    }
  } region{count, chunk, 0, body};
  GOMP_parallel(Region::run, &region, unsigned(n_threads), 0);
}

// A flag that any thread may lower.
class AllOf {
 public:
  void lower() { __atomic_store_n(&held_, false, __ATOMIC_RELAXED); }
  bool held() const { return held_; }

 private:
  bool held_ = true;
};

}  // namespace SELBP_LEVEL
}  // namespace selbp
