// A stand-in for the part of CUDA C++ that the kernels under csrc/ use, so that g++ compiles the real ones and a CPU
// runs them: each CUDA thread is a fiber, and the scheduler (scheduler.cpp) decides who runs on, from a seed.
//
// A fiber runs until it reaches a barrier, a shuffle or its end. The scheduler reports, as an exception of `launch`:
//   * a barrier that the threads of a block (or grid) do not all reach, or reach at different places in the code;
//   * a shuffle whose lanes do not all arrive, with the same mask;
//   * threads that wait for one another for ever;
//   * a write just past the end of a block's shared memory.
// Shared memory is as large as the launch said, to the byte, and full of NaNs (0xFF) when a block starts.
//
// Built with -fsanitize=thread (but scheduler.cpp without it and with -DSHIM_TSAN) it is a race detector that knows
// which accesses the barriers order; with -fsanitize=address it checks every bound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace shim {

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();
void block_barrier(const void* site);
void grid_barrier(const void* site);
// Posts `value` to the warp and returns what lane (own ^ lane_bits) posted.
std::uint64_t exchange(std::uint32_t mask, std::uint64_t value, unsigned lane_bits, const void* site);

struct Launch {
  unsigned blocks, threads;
  std::size_t shared_bytes;
  bool cooperative = false;  // all blocks at once, and grid barriers are allowed
  unsigned seed = 1;         // of the schedule
};

// Runs `body` once for each thread; returns how often the scheduler switched. Throws std::runtime_error.
long launch(const Launch& how, const std::function<void()>& body);

}  // namespace shim

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::shim::thread_index())
#define blockIdx (::shim::block_index())
#define blockDim (::shim::block_size())
#define gridDim (::shim::grid_size())
#define SELBP_DYNAMIC_SHARED(name) unsigned char* name = ::shim::shared_memory()
#define SELBP_GRID_SYNC() ::shim::grid_sync()

namespace shim {

// Where a barrier stands is the address that its call returns to: barriers must not be inlined.
__attribute__((noinline)) inline void grid_sync() { grid_barrier(__builtin_return_address(0)); }

}  // namespace shim

__attribute__((noinline)) inline void __syncthreads() { ::shim::block_barrier(__builtin_return_address(0)); }

template <class T>
__attribute__((noinline)) T __shfl_xor_sync(unsigned mask, T value, int lane_bits) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = ::shim::exchange(mask, bits, unsigned(lane_bits), __builtin_return_address(0));
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
