// Choosing rows on a GPU, one block a minibatch: three kernels, each the whole choice of its rules, so that a choice is
// one launch where torch's operators take dozens to thousands.
#pragma once

#include "selection/balanced.cuh"
#include "selection/diverse.cuh"

namespace selbp {
namespace SELBP_LEVEL {

__global__ void __launch_bounds__(kSelectThreads, 1) choose_kernel(selection::Choose problem) {
  SELBP_DYNAMIC_SHARED(shared);
  choose(problem, shared);
}

__global__ void __launch_bounds__(kSelectThreads, 1) balanced_kernel(selection::Balanced problem) {
  SELBP_DYNAMIC_SHARED(shared);
  balanced(problem, shared);
}

__global__ void __launch_bounds__(kSelectThreads, 1) diverse_kernel(selection::Diverse problem) {
  SELBP_DYNAMIC_SHARED(shared);
  diverse(problem, shared);
}

}  // namespace SELBP_LEVEL
}  // namespace selbp
