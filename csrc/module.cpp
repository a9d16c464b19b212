// The Python face of the CPU core, and the only file that includes pybind11. Buffers arrive as addresses and shapes
// that selbp/ops has already validated; nothing here knows torch.
#include <pybind11/pybind11.h>

#include "cpu/level.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of selbp; called through selbp.ops, which validates.";
  m.def("level", [] { return selbp::level_name(); }, "The x86-64 level whose kernels are in use.");
}
