// Choosing k rows by rank, or at random with known inclusion probabilities; selbp/ops/choose_rows.py specifies it.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

enum class ChooseRule : int { top = 0, odds = 1, rank = 2 };
enum class SlotWeights : int { mean = 0, batch = 1, unbiased = 2 };

struct ChooseProblem {
  std::int64_t n, k;
  const double* score;         // (n,)
  const unsigned char* valid;  // (n,)
  const double* draws;         // (n + 1,) uniform on [0, 1); null where nothing is drawn
  ChooseRule rule;
  SlotWeights mode;
  std::int64_t* indices;  // (k,)
  double* weights;        // (k,)
  double* scratch;        // (7 n,)
};

struct PercentileProblem {
  std::int64_t n, length;
  const double* loss;     // (n,) NaN: none
  const double* history;  // (length,) oldest first, NaN: none
  double* next;           // (length,) the history after these losses
  double* share;          // (n,) of the next history that is less than the loss
  double* scratch;        // (4 length,)
};

SELBP_DECLARE_LEVELS(void choose_rows(const ChooseProblem& problem); void percentile(const PercentileProblem& problem);)

}  // namespace selbp
