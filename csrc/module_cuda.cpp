// The Python face of the CUDA core: pybind11 and nothing of CUDA but what the families' cuda.hpp declare, so that g++
// compiles it. Addresses are of device memory; everything is enqueued on the caller's stream and nothing waits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "matching/cuda.hpp"
#include "selection/cuda.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check(std::int64_t code) {
  if (code != 0) throw std::runtime_error("CUDA: " + std::string(selbp::cuda::error_text(static_cast<int>(code))));
}

selbp::matching::Options options(int n, int k, int rule, bool nonnegative, double ridge, double tolerance) {
  return {n, k, static_cast<selbp::matching::Rule>(rule), nonnegative, ridge, tolerance};
}

template <typename T>
int launch_match(const selbp::matching::Options& options, const std::array<std::uintptr_t, 9>& buffers,
                 std::int64_t batch, std::uintptr_t workspace, int device, std::uintptr_t stream) {
  return selbp::cuda::launch_match<T>(
      options, {at<T>(buffers[0]), at<T>(buffers[1]), at<T>(buffers[2]), at<unsigned char>(buffers[3])},
      {at<std::int64_t>(buffers[4]), at<T>(buffers[5]), at<std::int32_t>(buffers[6]), at<T>(buffers[7]),
       at<unsigned char>(buffers[8])},
      batch, at<void>(workspace), device, at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m, py::mod_gil_not_used()) {
  m.doc() = "CUDA kernels of selbp; called through selbp.ops, which validates.";
  m.def("architectures", [] { return SELBP_CUDA_ARCHITECTURES; }, "What the kernels were compiled for.");
  m.def("probe", &selbp::cuda::probe, "A CUDA error code, 0 where the kernels run on the device.");
  m.def("error_text", &selbp::cuda::error_text, "What CUDA says of an error code.");
  m.def("match_workspace", [](std::int64_t batch, bool is_double, int n, int k, int device) {
    const std::int64_t bytes = selbp::cuda::match_workspace(options(n, k, 0, true, 0.0, 0.0), batch, is_double, device);
    if (bytes == -std::int64_t(selbp::cuda::kTooManyRows))
      throw py::value_error("k must be at most " + std::to_string(selbp::cuda::most_rows(is_double, device)) +
                            " of more rows than that on this GPU, whose shared memory holds a number for each chosen "
                            "row: got k = " +
                            std::to_string(k) + ", n = " + std::to_string(n));
    check(bytes < 0 ? -bytes : 0);
    return bytes;
  });
  m.def("match", [](const std::array<std::uintptr_t, 9>& buffers, bool is_double, std::int64_t batch, int n, int k,
                    int rule, bool nonnegative, double ridge, double tolerance, bool fill, std::uintptr_t workspace,
                    int device, std::uintptr_t stream) {
    auto chosen = options(n, k, rule, nonnegative, ridge, tolerance);
    chosen.fill = fill;
    check(is_double ? launch_match<double>(chosen, buffers, batch, workspace, device, stream)
                    : launch_match<float>(chosen, buffers, batch, workspace, device, stream));
  });
  m.def("launch_choice", [](int kernel, std::uintptr_t problem, std::size_t bytes, int threads, std::size_t shared,
                            int device, std::uintptr_t stream) {
    check(selbp::cuda::launch_choice(static_cast<selbp::cuda::Choice>(kernel), at<void>(problem), bytes, threads,
                                     shared, device, at<void>(stream)));
  });
}
