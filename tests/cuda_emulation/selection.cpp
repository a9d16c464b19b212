// The real kernels of csrc/selection on emulated threads: a shared library with the face of the CUDA core.
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda_shim.hpp"
#include "selection/kernels.cuh"

namespace device = selbp::device;
namespace selection = selbp::selection;

namespace {

std::string said;

template <class Problem>
int run(const shim::Launch& how, void (*kernel)(Problem), const void* problem, std::size_t bytes) {
  said = "a structure of another size";
  if (bytes != sizeof(Problem)) return 1;
  Problem copy;
  std::memcpy(&copy, problem, sizeof copy);
  try {
    shim::launch(how, [&] { kernel(copy); });
  } catch (const std::runtime_error& error) {
    said = error.what();
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" int launch_choice(int kernel, const void* problem, std::size_t bytes, unsigned threads, std::size_t shared,
                             unsigned schedule) {
  const shim::Launch how{1, threads, shared, false, schedule};
  switch (kernel) {
    case 0: return run(how, device::choose_kernel, problem, bytes);
    case 1: return run(how, device::balanced_kernel, problem, bytes);
    default: return run(how, device::diverse_kernel, problem, bytes);
  }
}

extern "C" const char* what_was_said() { return said.c_str(); }
