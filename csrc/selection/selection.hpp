// What the kernels that choose rows are handed, by address and by value: plain structures, whose twins are in
// selbp/ops/_choice_cuda.py. Pointers are of device memory; `single` says that the tensors it names are float32.
#pragma once

#include <cstdint>

namespace selbp {
namespace selection {

constexpr int kMostRows = 4096;  // that one block sorts in its shared memory

enum class Rule : std::int32_t { top = 0, odds = 1, rank = 2, norm = 3, percentile = 4 };
enum class Weights : std::int32_t { mean = 0, batch = 1, unbiased = 2 };

// selbp/ops/choose_rows.py and choose_gradients.py. Rule `norm` draws with odds sqrt(score), or sqrt(score * second).
// All odds are equal if no score is above 0, or if the running mean of tau does not exceed `threshold` (below 0: no
// such test). Rule `percentile` draws with odds max(least, share^power), share that of the last losses below the row's.
struct Choose {
  const void* score;           // (n,)
  const void* second;          // (n,) or null
  const unsigned char* valid;  // (n,)
  const double* draws;         // (n + 1,) uniform on [0, 1); null where nothing is drawn
  const double* before;        // () the running mean of tau, rule `norm`; (length,) the last losses, `percentile`
  double* after;               // and what becomes of it or of them
  double* odds;                // (n,) scratch, rule `percentile` alone
  std::int64_t* indices;       // (k,)
  void* weights;               // (k,)
  double momentum, threshold, power, least;
  std::int32_t n, k, length, single_score, single_weights;
  Rule rule;
  Weights mode;
};

// selbp/ops/choose_gradients.py: a draw of k rows, balanced on their inner products with p combinations of all rows.
struct Balanced {
  const void* gram;            // (n, n)
  const unsigned char* valid;  // (n,)
  const double* mixture;       // (n, p - 1) of standard normals
  const double* draws;         // (2, n) uniform: the order in which units are looked at, and the walk's
  std::int64_t* indices;       // (k,)
  void* weights;               // (k,)
  double* sketch;              // (n, p) scratch
  double* matrix;              // (p + 1, p + 2) scratch; null where that fits into the columns of the sort
  std::int32_t n, k, p, single_gram, single_weights, by_norm;
};

// selbp/ops/choose_gradients.py: a randomised matching pursuit.
struct Diverse {
  const void *gram, *inner, *target_sq;  // (n, n), (n,), ()
  const unsigned char* valid;            // (n,)
  const double* draws;                   // (k, n) uniform on [0, 1)
  std::int64_t* indices;                 // (k,)
  void* weights;                         // (k,)
  double* scratch;                       // (k + 4, n)
  double noise;                          // what rounding leaves of products, relative
  std::int32_t n, k, single, single_weights;
  Weights mode;
};

}  // namespace selection
}  // namespace selbp
