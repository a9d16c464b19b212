// The real matching kernels (csrc/matching/kernels.cuh) on emulated threads, beside the CPU's team on the same
// problems.
//
// Reads cases from standard input, one a line:
//   KERNEL DTYPE N K RULE NONNEGATIVE RIDGE TOLERANCE BATCH MASKED SEED SCHEDULE
// KERNEL is shared (tableau in shared memory), global or grid. MASKED is a sum: 1 some rows are not valid, 2 spare
// slots are filled, 4 no row is valid. Prints "equal", what differs, or what the stand-in saw.
#include <cstdio>
#include <iostream>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_shim.hpp"
#include "matching/cpu.hpp"
#include "matching/kernels.cuh"

namespace {

using selbp::matching::Answer;
using selbp::matching::Options;
using selbp::matching::Problem;
using selbp::matching::Rule;

// Device memory: exactly as large as asked, and full of NaNs.
class Memory {
 public:
  explicit Memory(std::size_t bytes) : bytes_(bytes) {
    if (posix_memalign(&data_, 256, bytes ? bytes : 1) != 0) throw std::bad_alloc();
    std::memset(data_, 0xFF, bytes);
  }
  ~Memory() { free(data_); }
  Memory(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  bool operator==(const Memory& other) const { return std::memcmp(data_, other.data_, bytes_) == 0; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_;
};

struct Case {
  std::string kernel, dtype;
  Options options;
  int batch, masked;
  unsigned seed, schedule;
};

// Gram matrices of n rows in about n / 2 dimensions, some rows twice, against targets that are partly outside of
// their cone: weights turn negative and rows leave again.
template <class T>
struct Inputs {
  Memory gram, inner, target_sq, valid;

  explicit Inputs(const Case& c)
      : gram(sizeof(T) * c.batch * c.options.n * c.options.n),
        inner(sizeof(T) * c.batch * c.options.n),
        target_sq(sizeof(T) * c.batch),
        valid(std::size_t(c.batch) * c.options.n) {
    std::mt19937 random(c.seed);
    std::normal_distribution<double> normal;
    const int n = c.options.n, d = n / 2 + 2;
    for (int p = 0; p < c.batch; ++p) {
      std::vector<double> rows(std::size_t(n) * d), target(d);
      for (double& x : rows) x = normal(random) + 0.3;
      for (int i = 5; i < n; i += 11) std::copy_n(&rows[std::size_t(i - 3) * d], d, &rows[std::size_t(i) * d]);
      for (int i = 0; i < n; ++i)
        for (int x = 0; x < d; ++x) target[x] += rows[std::size_t(i) * d + x] / n;
      for (double& x : target) x += 0.2 * normal(random);
      auto dot = [&](const double* a, const double* b) {
        double sum = 0;
        for (int x = 0; x < d; ++x) sum += a[x] * b[x];
        return T(sum);
      };
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j)
          gram.as<T>()[(std::size_t(p) * n + i) * n + j] = dot(&rows[std::size_t(i) * d], &rows[std::size_t(j) * d]);
        inner.as<T>()[std::size_t(p) * n + i] = dot(&rows[std::size_t(i) * d], target.data());
        valid.as<unsigned char>()[std::size_t(p) * n + i] = random() % 8 != 0 && !(c.masked & 4);
      }
      target_sq.as<T>()[p] = dot(target.data(), target.data());
    }
  }
  Problem<T> problem(int masked) const {
    return {gram.as<T>(), inner.as<T>(), target_sq.as<T>(), masked & 1 ? valid.as<unsigned char>() : nullptr};
  }
};

template <class T>
struct Outputs {
  Memory indices, weights, count, residual, status;

  explicit Outputs(const Case& c)
      : indices(sizeof(std::int64_t) * c.batch * c.options.k),
        weights(sizeof(T) * c.batch * c.options.k),
        count(sizeof(std::int32_t) * c.batch),
        residual(sizeof(T) * c.batch),
        status(std::size_t(c.batch)) {}
  Answer<T> answer() const {
    return {indices.as<std::int64_t>(), weights.as<T>(), count.as<std::int32_t>(), residual.as<T>(),
            status.as<unsigned char>()};
  }
  std::string difference(const Outputs& other) const {
    if (!(count == other.count)) return "count differs";
    if (!(indices == other.indices)) return "indices differ";
    if (!(weights == other.weights)) return "weights differ";
    if (!(residual == other.residual)) return "residual differs";
    return status == other.status ? "equal" : "status differs";
  }
};

[[maybe_unused]] bool on_cpu(const Case& c, const Problem<float>& problem, const Answer<float>& answer) {
  return selbp::baseline::match_f32(c.options, problem, answer, c.batch, 1);
}
[[maybe_unused]] bool on_cpu(const Case& c, const Problem<double>& problem, const Answer<double>& answer) {
  return selbp::baseline::match_f64(c.options, problem, answer, c.batch, 1);
}

// The launches of csrc/matching/cuda.cu, with as much memory as it asks for.
template <class T>
void on_gpu(const Case& c, const Problem<T>& problem, const Answer<T>& answer) {
  namespace device = selbp::device;
  const device::DeviceShape<T> shape(c.options.n, c.options.k);
  const unsigned threads = unsigned(shape.count < device::kBlockThreads ? shape.count : device::kBlockThreads);
  if (c.kernel == "shared") {
    shim::launch({unsigned(c.batch), threads, device::block_shared_bytes(shape, true), false, c.schedule},
                 [&] { device::match_blocks<T, true>(c.options, problem, answer, nullptr); });
  } else if (c.kernel == "global") {
    const Memory tableaus(std::size_t(c.batch) * device::block_global_bytes(shape));
    shim::launch({unsigned(c.batch), threads, device::block_shared_bytes(shape, false), false, c.schedule},
                 [&] { device::match_blocks<T, false>(c.options, problem, answer, tableaus.as<unsigned char>()); });
  } else {
    const int blocks = (shape.count + device::kGridThreads - 1) / device::kGridThreads;
    const Memory memory(device::grid_global_bytes(shape, blocks));
    shim::launch({unsigned(blocks), device::kGridThreads, device::grid_shared_bytes(shape), true, c.schedule},
                 [&] { device::match_grid<T>(c.options, problem, answer, c.batch, memory.as<unsigned char>()); });
  }
}

// What selbp/reference/sampling.py's `fill_spare` makes of the indices.
template <class T>
void fill(const Case& c, const Problem<T>& problem, const Answer<T>& answer) {
  for (int p = 0; p < c.batch; ++p) {
    std::int64_t* const indices = answer.indices + std::size_t(p) * c.options.k;
    std::int64_t spare = 0;
    for (int i = c.options.n - 1; i >= 0; --i)
      if (!problem.valid || problem.valid[std::size_t(p) * c.options.n + i]) spare = i;
    if (answer.count[p] > 0) spare = indices[0];
    for (int u = answer.count[p]; u < c.options.k; ++u) indices[u] = spare;
  }
}

template <class T>
std::string compare(const Case& c) {
  const Inputs<T> inputs(c);
  const Outputs<T> wanted(c), got(c);
  if (!on_cpu(c, inputs.problem(c.masked), wanted.answer())) return "the CPU ran out of memory";
  if (c.masked & 2) fill(c, inputs.problem(c.masked), wanted.answer());
  Case filled = c;
  filled.options.fill = (c.masked & 2) != 0;
  on_gpu<T>(filled, inputs.problem(c.masked), got.answer());
  return got.difference(wanted);
}

}  // namespace

int main() {
  std::string line;
  while (std::getline(std::cin, line)) {
    std::istringstream words(line);
    Case c;
    int rule, nonnegative;
    words >> c.kernel >> c.dtype >> c.options.n >> c.options.k >> rule >> nonnegative >> c.options.ridge >>
        c.options.tolerance >> c.batch >> c.masked >> c.seed >> c.schedule;
    c.options.rule = static_cast<Rule>(rule);
    c.options.nonnegative = nonnegative != 0;
    try {
#if defined(ONLY_F32)
      std::cout << (words && c.dtype == "f32" ? compare<float>(c) : "not a case of this build") << std::endl;
#else
      std::cout << (!words ? "not a case" : c.dtype == "f32" ? compare<float>(c) : compare<double>(c)) << std::endl;
#endif
    } catch (const std::runtime_error& error) {
      std::cout << error.what() << std::endl;
      return 3;  // fibers have been left where they were
    }
  }
  return 0;
}
