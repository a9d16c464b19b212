// Small kernels, right and wrong, that show what the stand-in sees. Usage: selftest KERNEL SEED
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_shim.hpp"

namespace {

constexpr unsigned kThreads = 96, kBlocks = 3;

// Each thread writes its number, then reads its right neighbour's from another warp or its own.
__global__ void rotate(int* out, bool barrier) {
  SELBP_DYNAMIC_SHARED(raw);
  int* shared = reinterpret_cast<int*>(raw);
  const unsigned t = threadIdx.x;
  shared[t] = int(t);
  if (barrier) __syncthreads();
  out[blockIdx.x * kThreads + t] = shared[(t + 1) % kThreads];
}

__global__ void warp_sum(int* out) {
  int sum = int(threadIdx.x);
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

__global__ void grid_total(int* out, int* partial) {
  if (threadIdx.x == 0) partial[blockIdx.x] = int(blockIdx.x) + 1;
  SELBP_GRID_SYNC();
  int total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b];
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

__global__ void divergent() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void leaves_early() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void half_a_shuffle(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}

__global__ void outside_the_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16); }

__global__ void past_the_end() {
  SELBP_DYNAMIC_SHARED(raw);
  reinterpret_cast<int*>(raw)[kThreads + threadIdx.x / 95] = 1;
}

__global__ void reads_unwritten(int* out) {
  SELBP_DYNAMIC_SHARED(raw);
  out[threadIdx.x] = reinterpret_cast<float*>(raw)[threadIdx.x] == reinterpret_cast<float*>(raw)[threadIdx.x];
}

int run(const std::string& kernel, unsigned seed) {
  const std::size_t shared = kThreads * sizeof(int);
  std::vector<int> out(kBlocks * kThreads, -1), partial(kBlocks, -1);
  auto expect = [&](auto wanted) {
    for (unsigned i = 0; i < out.size(); ++i)
      if (out[i] != wanted(i / kThreads, i % kThreads)) return printf("wrong\n"), 1;
    return printf("right\n"), 0;
  };
  const shim::Launch one{1, kThreads, shared, false, seed}, all{kBlocks, kThreads, shared, false, seed};
  const shim::Launch together{kBlocks, kThreads, shared, true, seed};
  if (kernel == "rotate" || kernel == "missing_barrier") {
    shim::launch(all, [&] { rotate(out.data(), kernel == "rotate"); });
    return expect([](unsigned, unsigned t) { return int((t + 1) % kThreads); });
  }
  if (kernel == "warp_sum") {
    shim::launch(all, [&] { warp_sum(out.data()); });
    return expect([](unsigned, unsigned t) { return int(t / 32 * 1024 + 496); });
  }
  if (kernel == "grid_total" || kernel == "grid_barrier_alone") {
    shim::launch(kernel == "grid_total" ? together : all, [&] { grid_total(out.data(), partial.data()); });
    return expect([](unsigned, unsigned) { return 6; });
  }
  if (kernel == "reads_unwritten") {
    shim::launch(one, [&] { reads_unwritten(out.data()); });
    for (unsigned t = 0; t < kThreads; ++t)
      if (out[t]) return printf("wrong\n"), 1;
    return printf("right\n"), 0;
  }
  if (kernel == "divergent") shim::launch(all, divergent);
  if (kernel == "leaves_early") shim::launch(all, leaves_early);
  if (kernel == "half_a_shuffle") shim::launch(one, [&] { half_a_shuffle(out.data()); });
  if (kernel == "outside_the_mask") shim::launch(one, [&] { outside_the_mask(out.data()); });
  if (kernel == "past_the_end") shim::launch(one, past_the_end);
  return printf("nothing was noticed\n"), 1;
}

}  // namespace

int main(int, char** arguments) {
  try {
    return run(arguments[1], unsigned(std::atoi(arguments[2])));
  } catch (const std::runtime_error& error) {
    printf("%s\n", error.what());
    return 3;
  }
}
