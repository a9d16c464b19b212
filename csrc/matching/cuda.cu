// Chooses and launches the kernels of matching/kernels.cuh.
#include <cuda_runtime.h>

#define SELBP_LEVEL device
#include "matching/cuda.hpp"
#include "matching/kernels.cuh"
#include "team/on_device.hpp"

namespace selbp {
namespace {

using matching::Answer;
using matching::Options;
using matching::Problem;

// Where a tableau is larger than this and problems are fewer than a quarter of the multiprocessors, each problem gets
// the whole grid. Unmeasured: from the time one multiprocessor takes to read it against a barrier of the grid.
constexpr std::size_t kGridTableau = std::size_t(512) << 10;

enum class Kernel { blocks_shared, blocks_global, grid };

struct Plan {
  Kernel kernel;
  int blocks, threads;
  std::size_t shared, workspace;
};

template <class T>
int make_plan(const Options& options, std::int64_t batch, int device_index, Plan* plan) {
  const device::DeviceShape<T> shape(options.n, options.k);
  int limit = 0, processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_index);
  if (error != cudaSuccess) return error;
  const std::size_t all = device::block_shared_bytes(shape, true), arrays = device::block_shared_bytes(shape, false);
  const bool few = batch * 4 < processors && shape.tableau_bytes() > kGridTableau;
  const int columns = shape.count > 0 ? shape.count : device::kWarp;  // a multiple of the warp either way
  const int threads = columns < device::kBlockThreads ? columns : device::kBlockThreads;
  if (all <= std::size_t(limit)) {
    *plan = {Kernel::blocks_shared, int(batch), threads, all, 0};
  } else if (arrays <= std::size_t(limit) && !few) {
    *plan = {Kernel::blocks_global, int(batch), threads, arrays,
             std::size_t(batch) * device::block_global_bytes(shape)};
  } else {
    const std::size_t shared = device::grid_shared_bytes(shape);
    if (shared > std::size_t(limit)) return cuda::kTooManyRows;
    int resident = 0;
    error = cudaFuncSetAttribute(device::match_grid<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error == cudaSuccess)
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, device::match_grid<T>, device::kGridThreads, shared);
    if (error != cudaSuccess) return error;
    const int wanted = (shape.count + device::kGridThreads - 1) / device::kGridThreads;
    const int blocks = wanted < resident * processors ? wanted : resident * processors;
    if (blocks < 1) return cudaErrorInvalidConfiguration;
    *plan = {Kernel::grid, blocks, device::kGridThreads, shared, device::grid_global_bytes(shape, blocks)};
  }
  return cudaSuccess;
}

template <class T, bool shared_tableau>
cudaError_t launch_blocks(const Plan& plan, const Options& options, const Problem<T>& problems,
                          const Answer<T>& answers, unsigned char* workspace, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(device::match_blocks<T, shared_tableau>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(plan.shared));
  if (error != cudaSuccess) return error;
  device::match_blocks<T, shared_tableau>
      <<<unsigned(plan.blocks), unsigned(plan.threads), plan.shared, stream>>>(options, problems, answers, workspace);
  return cudaGetLastError();
}

}  // namespace

namespace cuda {

int probe(int device) {
  const OnDevice here(device);
  cudaFuncAttributes attributes;
  return here.error() != cudaSuccess ? int(here.error())
                                     : int(cudaFuncGetAttributes(&attributes, device::match_blocks<float, true>));
}

std::int64_t match_workspace(const Options& options, std::int64_t batch, bool is_double, int device) {
  const OnDevice here(device);
  if (here.error() != cudaSuccess) return -std::int64_t(here.error());
  Plan plan;
  const int error =
      is_double ? make_plan<double>(options, batch, device, &plan) : make_plan<float>(options, batch, device, &plan);
  return error == 0 ? std::int64_t(plan.workspace) : -std::int64_t(error);
}

template <class T>
int launch_match(const Options& options, const Problem<T>& problems, const Answer<T>& answers, std::int64_t batch,
                 void* workspace, int device, void* stream) {
  const OnDevice here(device);
  if (here.error() != cudaSuccess) return int(here.error());
  Plan plan;
  const int error = make_plan<T>(options, batch, device, &plan);
  if (error != 0) return error;
  unsigned char* memory = static_cast<unsigned char*>(workspace);
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (plan.kernel) {
    case Kernel::blocks_shared: return int(launch_blocks<T, true>(plan, options, problems, answers, memory, queue));
    case Kernel::blocks_global: return int(launch_blocks<T, false>(plan, options, problems, answers, memory, queue));
    default: break;
  }
  Options options_copy = options;
  Problem<T> problems_copy = problems;
  Answer<T> answers_copy = answers;
  void* arguments[] = {&options_copy, &problems_copy, &answers_copy, &batch, &memory};
  return int(cudaLaunchCooperativeKernel(device::match_grid<T>, unsigned(plan.blocks), unsigned(plan.threads),
                                         arguments, plan.shared, queue));
}

template int launch_match<float>(const Options&, const Problem<float>&, const Answer<float>&, std::int64_t, void*, int,
                                 void*);
template int launch_match<double>(const Options&, const Problem<double>&, const Answer<double>&, std::int64_t, void*,
                                  int, void*);

const char* error_text(int code) {
  return code == kTooManyRows ? "too many rows to choose for the GPU's shared memory"
                              : cudaGetErrorString(static_cast<cudaError_t>(code));
}

std::int64_t most_rows(bool is_double, int device) {
  const OnDevice here(device);
  int limit = 0;
  if (here.error() != cudaSuccess ||
      cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess)
    return 0;
  const std::size_t ballots =
      is_double ? device::ballot_bytes<double>(device::kWarp) : device::ballot_bytes<float>(device::kWarp);
  return std::int64_t((std::size_t(limit) - ballots) / (is_double ? sizeof(double) : sizeof(float)));
}

}  // namespace cuda
}  // namespace selbp
