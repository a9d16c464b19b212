// The Python face of the CPU core, and the only file that includes pybind11. Buffers arrive as addresses and shapes
// that selbp/ops has already validated; nothing here knows torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "choose_rows/cpu.hpp"
#include "cpu/level.hpp"
#include "cube/cpu.hpp"
#include "draw/cpu.hpp"
#include "gram/cpu.hpp"
#include "matching/cpu.hpp"
#include "matching/gradients.hpp"
#include "mean_gradient/cpu.hpp"
#include "statistics/cpu.hpp"
#include "statistics/minibatch.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_choose_rows(py::module_& m) {
  using Address = std::uintptr_t;
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def(
      "choose_rows",
      [](std::int64_t n, std::int64_t k, Address score, Address valid, Address draws, int rule, int weights,
         Address indices, Address found, Address scratch) {
        SELBP_PICK(choose_rows)({n, k, at<double>(score), at<unsigned char>(valid), at<double>(draws),
                                 static_cast<selbp::ChooseRule>(rule), static_cast<selbp::SlotWeights>(weights),
                                 at<std::int64_t>(indices), at<double>(found), at<double>(scratch)});
      },
      Released());
  m.def(
      "percentile",
      [](std::int64_t n, std::int64_t length, Address loss, Address history, Address next, Address share,
         Address scratch) {
        SELBP_PICK(percentile)({n, length, at<double>(loss), at<double>(history), at<double>(next), at<double>(share),
                                at<double>(scratch)});
      },
      Released());
}

void bind_cube(py::module_& m) {
  using Address = std::uintptr_t;
  m.def(
      "cube",
      [](std::int64_t n, std::int64_t dimensions, Address x, Address probability, Address order, Address draws,
         Address scratch, Address group) {
        return SELBP_PICK(cube)({n, dimensions, at<double>(x), at<double>(probability), at<std::int64_t>(order),
                                 at<double>(draws), at<double>(scratch), at<std::int64_t>(group)});
      },
      py::call_guard<py::gil_scoped_release>());
}

void bind_draw(py::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Columns = std::array<Address, 5>;
  using Released = py::call_guard<py::gil_scoped_release>;
  static const auto columns = [](const Columns& x) {
    return selbp::ScoreColumns{at<float>(x[0]), at<float>(x[1]), at<std::int32_t>(x[2]), at<std::int32_t>(x[3]),
                               at<Size>(x[4])};
  };
  m.def(
      "draw",
      [](Size pool, Size k, Size uniform, Address ids, const Columns& table, Address factor, double power, double floor,
         std::uint64_t seed, std::uint64_t step, Address rows, Address odds, Address draws, Address scratch) {
        SELBP_PICK(draw)({pool, k, uniform, at<Size>(ids), columns(table), at<double>(factor), power, floor, seed, step,
                          at<Size>(rows), at<double>(odds), at<double>(draws), at<void>(scratch)});
      },
      Released());
  m.def(
      "record",
      [](Size rows, Size classes, Size stride, Address logits, Address target, Address ids, Address place, Address live,
         Size uniform, Size time, const Columns& table, Address state, Address transition, Address counts,
         double window, Address scratch) {
        return SELBP_PICK(record)({rows, classes, stride, at<float>(logits), at<Size>(target), at<Size>(ids),
                                   at<Size>(place), at<unsigned char>(live), uniform, time, columns(table),
                                   at<double>(state), at<double>(transition), at<double>(counts), window,
                                   at<double>(scratch)});
      },
      Released());
}

template <typename T>
T* packed_or_kept(std::uintptr_t packed, const selbp::GramShape& shape) {
  return packed ? at<T>(packed) : selbp::kept_scratch<T>(static_cast<std::size_t>(selbp::packed_count(shape)));
}

void bind_gram(py::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Released = py::call_guard<py::gil_scoped_release>;
  m.def(
      "gram",
      [](Address out, Address packed, Address r, Address h, bool is_double, Size n, Size classes, Size features,
         bool bias, int n_threads) {
        const selbp::GramShape shape{n, classes, features};
        if (is_double)
          return SELBP_PICK(gram_f64)(at<double>(out), packed_or_kept<double>(packed, shape), at<double>(r),
                                      at<double>(h), shape, bias, n_threads);
        return SELBP_PICK(gram_f32)(at<float>(out), packed_or_kept<float>(packed, shape), at<float>(r), at<float>(h),
                                    shape, bias, n_threads);
      },
      Released(), "packed: 0 for memory that the thread keeps.");
  m.def(
      "row_dots",
      [](Address sums, Address a, Address b, bool is_double, Size rows, Size columns, int n_threads) {
        if (is_double)
          SELBP_PICK(row_dots_f64)(at<double>(sums), at<double>(a), at<double>(b), rows, columns, n_threads);
        else
          SELBP_PICK(row_dots_f32)(at<double>(sums), at<float>(a), at<float>(b), rows, columns, n_threads);
      },
      Released());
#if defined(SELBP_BFLOAT16_PRODUCTS) && defined(SELBP_X86_LEVELS)
  m.def(
      "gram_pairs",
      [](Address out, Address packed, Address r, Address h, Size n, Size class_pairs, Size feature_pairs, bool bias,
         int n_threads) {
        return selbp::v4::gram_bf16(at<float>(out), at<float>(packed), at<float>(r), at<float>(h),
                                    {n, class_pairs, feature_pairs}, bias, n_threads);
      },
      Released(), "gram of bfloat16 factors, a pair of terms at a time; only where multiplies_bfloat16().");
#endif
  m.def("multiplies_bfloat16", [] { return selbp::multiplies_bfloat16(); }, "Whether gram_pairs can run here.");
}

template <typename T, typename Solve>
void match(Solve solve, const selbp::matching::Options& options, const std::array<std::uintptr_t, 9>& buffers,
           std::int64_t batch, int n_threads) {
  const selbp::matching::Problem<T> problems{at<T>(buffers[0]), at<T>(buffers[1]), at<T>(buffers[2]),
                                             at<unsigned char>(buffers[3])};
  const selbp::matching::Answer<T> answers{at<std::int64_t>(buffers[4]), at<T>(buffers[5]),
                                           at<std::int32_t>(buffers[6]), at<T>(buffers[7]),
                                           at<unsigned char>(buffers[8])};
  if (!solve(options, problems, answers, batch, n_threads)) throw std::bad_alloc();
}

void bind_matching(py::module_& m) {
  m.def(
      "match",
      [](const std::array<std::uintptr_t, 9>& buffers, bool is_double, std::int64_t batch, int n, int k, int rule,
         bool nonnegative, double ridge, double tolerance, int n_threads, std::int64_t near_bytes, bool fill) {
        const py::gil_scoped_release released;
        selbp::matching::Options options{n, k, static_cast<selbp::matching::Rule>(rule), nonnegative, ridge, tolerance};
        options.fill = fill;
        if (near_bytes >= 0) options.near_bytes = static_cast<std::size_t>(near_bytes);
        if (is_double)
          match<double>(SELBP_PICK(match_f64), options, buffers, batch, n_threads);
        else
          match<float>(SELBP_PICK(match_f32), options, buffers, batch, n_threads);
      },
      py::arg("buffers"), py::arg("is_double"), py::arg("batch"), py::arg("n"), py::arg("k"), py::arg("rule"),
      py::arg("nonnegative"), py::arg("ridge"), py::arg("tolerance"), py::arg("n_threads"), py::arg("near_bytes") = -1,
      py::arg("fill") = false,
      "buffers: gram, inner, target_sq, valid (0: all), indices, weights, count, residual, status.");
}

template <typename T>
selbp::GradientFactors<T> factors_of(std::uintptr_t r, std::uintptr_t h, const std::array<std::int64_t, 3>& shape,
                                     bool bias) {
  return {at<T>(r), at<T>(h), shape[0], shape[1], shape[2], bias};
}

template <typename T>
selbp::MeanGradientOutput<T> mean_output(const std::array<std::uintptr_t, 4>& buffers) {
  return {at<T>(buffers[0]), at<T>(buffers[1]), at<T>(buffers[2]), at<T>(buffers[3])};
}

void bind_mean_gradient(py::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  m.def(
      "mean_gradient",
      [](Address r, Address h, bool is_double, const std::array<Size, 3>& shape, bool bias,
         const std::array<Address, 4>& out, int n_threads) {
        const py::gil_scoped_release released;
        if (is_double)
          return selbp::GradientKernels::mean(factors_of<double>(r, h, shape, bias), mean_output<double>(out),
                                              n_threads);
        return selbp::GradientKernels::mean(factors_of<float>(r, h, shape, bias), mean_output<float>(out), n_threads);
      },
      "shape: n, classes, width; out: inner, target_sq, head_weight, head_bias.");
  m.def(
      "matching_residual",
      [](Address r, Address h, const std::array<Size, 3>& shape, bool bias, Address indices, Address weights, Size k) {
        const py::gil_scoped_release released;
        double squares[2];
        double* scratch =
            selbp::kept_scratch<double>(static_cast<std::size_t>(selbp::residual_scratch(k, shape[1], shape[2])));
        SELBP_PICK(matching_residual)
        (factors_of<double>(r, h, shape, bias), {at<Size>(indices), at<double>(weights), k}, squares, scratch);
        return std::array<double, 2>{squares[0], squares[1]};
      },
      "Squared norms of M - sum_j w_j g_j and of M.");
  m.def(
      "match_gradients",
      [](Address r, Address h, bool is_double, const std::array<Size, 3>& shape, bool bias, int k, int rule,
         bool nonnegative, double ridge, Address valid, Address indices, Address weights) {
        const py::gil_scoped_release released;
        selbp::matching::Options options{
            static_cast<int>(shape[0]), k, static_cast<selbp::matching::Rule>(rule), nonnegative, ridge, 0.0};
        options.fill = true;
        const auto* rows = at<unsigned char>(valid);
        if (is_double)
          return selbp::match_gradients<double>(factors_of<double>(r, h, shape, bias), options, rows, at<Size>(indices),
                                                at<double>(weights));
        return selbp::match_gradients<float>(factors_of<float>(r, h, shape, bias), options, rows, at<Size>(indices),
                                             at<float>(weights));
      },
      "False where a number is not finite; indices and weights are then unset.");
}

template <typename A>
selbp::MinibatchOutput<A> minibatch_output(const std::array<std::uintptr_t, 11>& out) {
  return {at<A>(out[0]),    at<A>(out[1]), at<A>(out[2]), at<A>(out[3]), at<bool>(out[4]),
          at<bool>(out[5]), at<A>(out[6]), at<A>(out[7]), at<A>(out[8]), at<std::int64_t>(out[9]),
          at<A>(out[10])};
}

void bind_statistics(py::module_& m) {
  using Address = std::uintptr_t;
  using Size = std::int64_t;
  using Released = py::call_guard<py::gil_scoped_release>;
  m.attr("STATISTICS_STATE") = selbp::kStateDoubles;
  m.def(
      "statistics",
      [](Address logits, int type, Size row_stride, Size rows, Size columns, Size first_class, Size n_classes,
         Address features, int feature_type, Size feature_stride, Size n_features, bool feature_bias, Address target,
         Address class_weight, Size ignore_index, double label_smoothing, double softcap, Address state, Address loss,
         Address lse, Address residual_sq, Address feature_sq, Address p_rest, Address correct, Address valid,
         int n_threads) {
        const selbp::Matrix z{at<void>(logits), selbp::Type(type), row_stride, rows, columns};
        const selbp::Matrix h{at<void>(features), selbp::Type(feature_type), feature_stride, rows, n_features};
        const selbp::LossOptions options{at<Size>(target), at<void>(class_weight), ignore_index, label_smoothing,
                                         softcap};
        const selbp::StatisticsOutput out{at<void>(loss),       at<void>(lse),    at<void>(residual_sq),
                                          at<void>(feature_sq), at<void>(p_rest), at<bool>(correct),
                                          at<bool>(valid)};
        return SELBP_PICK(statistics)(z, first_class, n_classes, h, feature_bias, options, at<selbp::RowState>(state),
                                      out, n_threads);
      },
      Released());
  m.def(
      "head_statistics",
      [](Address features, Size feature_stride, Size rows, Size n_features, Address weight, Size weight_stride,
         Size n_classes, Address bias, Address target, Address class_weight, Size ignore_index, Address loss,
         Address lse, Address residual_sq, Address feature_sq, Address p_rest, Address correct, Address valid) {
        const selbp::Matrix h{at<void>(features), selbp::Type::f32, feature_stride, rows, n_features};
        const selbp::Matrix w{at<void>(weight), selbp::Type::f32, weight_stride, n_classes, n_features};
        const selbp::LossOptions options{at<Size>(target), at<void>(class_weight), ignore_index, 0.0, 0.0};
        const selbp::StatisticsOutput out{at<void>(loss),       at<void>(lse),    at<void>(residual_sq),
                                          at<void>(feature_sq), at<void>(p_rest), at<bool>(correct),
                                          at<bool>(valid)};
        std::vector<float> scratch(static_cast<std::size_t>(selbp::head_scratch(n_classes, n_features)));
        return SELBP_PICK(head_statistics)(h, w, at<float>(bias), options, out, scratch.data());
      },
      Released());
  m.def(
      "score_minibatch",
      [](Address logits, int type, Size row_stride, Size rows, Size classes, Address features, int feature_type,
         Size feature_stride, Size n_features, bool feature_bias, Address target, Address class_weight,
         Size ignore_index, double label_smoothing, double softcap, double weight_sum,
         const std::array<Address, 11>& out, int n_threads) {
        const py::gil_scoped_release released;
        const selbp::Matrix z{at<void>(logits), selbp::Type(type), row_stride, rows, classes};
        const selbp::Matrix h{at<void>(features), selbp::Type(feature_type), feature_stride, rows, n_features};
        const selbp::LossOptions options{at<Size>(target), at<void>(class_weight), ignore_index, label_smoothing,
                                         softcap};
        if (z.type == selbp::Type::f64)
          return selbp::score_minibatch(z, h, feature_bias, options, weight_sum, minibatch_output<double>(out),
                                        n_threads);
        return selbp::score_minibatch(z, h, feature_bias, options, weight_sum, minibatch_output<float>(out), n_threads);
      },
      "out: loss, lse, residual_sq, feature_sq, correct, valid, mass, scaled, scale, hits, residual (0: not wanted).");
  m.def(
      "residual",
      [](Address out, Address logits, int type, Size row_stride, Size rows, Size columns, Size first_class,
         Size n_classes, double weight_sum, Address lse, Address p_rest, Address scale, Address target,
         Address class_weight, Size ignore_index, double label_smoothing, double softcap, int n_threads) {
        const selbp::Matrix z{at<void>(logits), selbp::Type(type), row_stride, rows, columns};
        const selbp::ResidualTile tile{first_class,   n_classes,        weight_sum,
                                       at<void>(lse), at<void>(p_rest), at<void>(scale)};
        const selbp::LossOptions options{at<Size>(target), at<void>(class_weight), ignore_index, label_smoothing,
                                         softcap};
        return SELBP_PICK(residual)(z, tile, options, at<void>(out), n_threads);
      },
      Released());
}

}  // namespace

// Without the GIL nothing changes: every kernel has always run with it released.
PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  if (!selbp::level_name_valid()) {
    throw std::invalid_argument("SELBP_CPU_LEVEL must be baseline, v3 or v4, got '" +
                                std::string(std::getenv("SELBP_CPU_LEVEL")) + "'");
  }
  m.doc() = "CPU kernels of selbp; called through selbp.ops, which validates.";
  m.attr("SOURCES") = SELBP_SOURCES;
  m.def("level", [] { return selbp::level_name(); }, "The x86-64 level whose kernels are in use.");
  bind_choose_rows(m);
  bind_cube(m);
  bind_draw(m);
  bind_gram(m);
  bind_matching(m);
  bind_mean_gradient(m);
  bind_statistics(m);
}
