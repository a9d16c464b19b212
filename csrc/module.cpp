// The Python face of the CPU core, and the only file that includes pybind11. Buffers arrive as addresses and shapes
// that selbp/ops has already validated; nothing here knows torch.
#include <pybind11/pybind11.h>

#include "cpu/level.hpp"
#include "gram/cpu.hpp"
#include "stream/cpu.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_gram(py::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def(
      "gram_tile",
      [](Address out, Address rr, Address hh, bool is_double, Size n, Size row, Size column, Size rows, Size columns,
         bool bias, int n_threads) {
        const selbp::GramTile tile{n, row, column, rows, columns};
        if (is_double)
          SELBP_PICK(gram_tile_f64)(at<double>(out), at<double>(rr), at<double>(hh), tile, bias, n_threads);
        else
          SELBP_PICK(gram_tile_f32)(at<float>(out), at<float>(rr), at<float>(hh), tile, bias, n_threads);
      },
      Released());
  m.def(
      "row_dots",
      [](Address sums, Address a, Address b, bool is_double, Size rows, Size columns, int n_threads) {
        if (is_double)
          SELBP_PICK(row_dots_f64)(at<double>(sums), at<double>(a), at<double>(b), rows, columns, n_threads);
        else
          SELBP_PICK(row_dots_f32)(at<double>(sums), at<float>(a), at<float>(b), rows, columns, n_threads);
      },
      Released());
  m.def(
      "stream_read",
      [](Address source, Size count, int repeats, int n_threads) {
        return SELBP_PICK(stream_read)(at<float>(source), count, repeats, n_threads);
      },
      Released());
  m.def(
      "stream_copy",
      [](Address target, Address source, Size count, int repeats, int n_threads) {
        SELBP_PICK(stream_copy)(at<float>(target), at<float>(source), count, repeats, n_threads);
      },
      Released());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of selbp; called through selbp.ops, which validates.";
  m.def("level", [] { return selbp::level_name(); }, "The x86-64 level whose kernels are in use.");
  bind_gram(m);
}
