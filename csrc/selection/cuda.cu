// Launches the kernels of selection/kernels.cuh.
#include <cuda_runtime.h>

#define SELBP_LEVEL device
#include "selection/cuda.hpp"
#include "selection/kernels.cuh"
#include "team/on_device.hpp"

namespace selbp {
namespace cuda {

int launch_choice(Choice kernel, void* problem, std::size_t bytes, int threads, std::size_t shared, int device,
                  void* stream) {
  const void* function = reinterpret_cast<const void*>(device::choose_kernel);
  std::size_t wanted = sizeof(selection::Choose);
  if (kernel == Choice::balanced) {
    function = reinterpret_cast<const void*>(device::balanced_kernel);
    wanted = sizeof(selection::Balanced);
  } else if (kernel == Choice::diverse) {
    function = reinterpret_cast<const void*>(device::diverse_kernel);
    wanted = sizeof(selection::Diverse);
  }
  if (bytes != wanted) return cudaErrorInvalidValue;
  const OnDevice here(device);
  if (here.error() != cudaSuccess) return int(here.error());
  const cudaError_t error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
  if (error != cudaSuccess) return int(error);
  void* arguments[] = {problem};
  return int(cudaLaunchKernel(function, dim3(1), dim3(unsigned(threads)), arguments, shared,
                              static_cast<cudaStream_t>(stream)));
}

}  // namespace cuda
}  // namespace selbp
