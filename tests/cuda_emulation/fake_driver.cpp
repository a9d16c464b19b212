// The part of the driver's interface that selbp/ops/_nvrtc_core.py calls, on emulated threads: a shared library, so
// that the launch itself (structures, sizes, addresses) can be run where there is no GPU.
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>

#include "cuda_shim.hpp"
#include "matching/kernels.cuh"

namespace {

using selbp::matching::Answer;
using selbp::matching::Options;
using selbp::matching::Problem;

constexpr int kInvalidValue = 1, kInvalidContext = 201;
int depth = 0;                  // contexts that were pushed and not popped
std::map<long, int> permitted;  // function -> bytes of dynamic shared memory
std::string said;

template <class T, bool shared>
void run(const shim::Launch& how, void** given) {
  shim::launch(how, [&] {
    selbp::device::match_blocks<T, shared>(*static_cast<Options*>(given[0]), *static_cast<Problem<T>*>(given[1]),
                                           *static_cast<Answer<T>*>(given[2]), *static_cast<unsigned char**>(given[3]));
  });
}

}  // namespace

extern "C" {

int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &depth, 0; }
int cuCtxPushCurrent_v2(void* context) { return context == &depth ? ++depth, 0 : kInvalidContext; }
int cuCtxPopCurrent_v2(void** context) { return *context = &depth, --depth, 0; }
int cuModuleLoadData(void** module, const char* image) {
  *module = const_cast<char*>(image);
  return depth == 1 && std::strcmp(image, "image") == 0 ? 0 : kInvalidContext;
}
// 2 for double, 1 for a shared tableau, and one more: a handle is not null.
int cuModuleGetFunction(long* function, void*, const char* name) {
  *function = 1 + (std::strstr(name, "blocksId") ? 2 : 0) + (std::strstr(name, "Lb1E") ? 1 : 0);
  return 0;
}
int cuFuncSetAttribute(long function, int attribute, int value) {
  permitted[function] = value;
  return attribute == 8 ? 0 : kInvalidValue;
}
int cuGetErrorString(int, const char** text) { return *text = said.c_str(), 0; }

int cuLaunchKernel(long function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, void* stream, void** given, void** extra) {
  said = "a launch that the kernels do not expect";
  if (depth != 1) return kInvalidContext;
  if (y != 1 || z != 1 || threads_y != 1 || threads_z != 1 || extra || threads % 32 != 0 || threads == 0 ||
      threads > 512 || int(shared) > permitted[function] || stream != reinterpret_cast<void*>(std::size_t(77)))
    return kInvalidValue;
  const shim::Launch how{x, threads, shared, false, 1};
  try {
    switch (function) {
      case 1: run<float, false>(how, given); break;
      case 2: run<float, true>(how, given); break;
      case 3: run<double, false>(how, given); break;
      default: run<double, true>(how, given);
    }
  } catch (const std::runtime_error& error) {
    said = error.what();
    return kInvalidValue;
  }
  return 0;
}

}  // extern "C"
