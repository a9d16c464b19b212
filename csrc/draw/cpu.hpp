// Drawing rows by the odds of a table of scores, and writing fresh scores back. `specified` in selbp/sampling/draw.py
// and record.py are the specifications.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

// What the table holds of each sample, (samples,) each.
struct ScoreColumns {
  float* probability;     // of the given label; NaN: unknown
  float* responsibility;  // that the label is right; NaN: unknown
  std::int32_t* label;    // given; -1: unknown
  std::int32_t* rival;    // the most probable other label; -1: unknown
  std::int64_t* seen;     // when it was last trained on; 0: scored by a proxy, -1: never
};

struct DrawProblem {
  std::int64_t pool, k, uniform;  // ids to choose among, rows to draw, how many of them without regard to the odds
  const std::int64_t* ids;        // (pool,)
  ScoreColumns table;
  const double* factor;  // (classes,) on the odds of each given label; null: none
  double power, floor;
  std::uint64_t seed, step;
  std::int64_t* rows;  // (k,) places in the pool, the uniform ones first, each part in the order of its keys
  double* odds;        // (pool,) 0 for the uniform ones
  double* draws;       // (pool + 1,) uniform; null: draw the rest by Gumbel's keys
  void* scratch;       // (16 k,) bytes
};

struct RecordProblem {
  std::int64_t rows, classes, stride;
  const float* logits;         // (rows, classes), `stride` from row to row
  const std::int64_t* target;  // (rows,)
  const std::int64_t* ids;     // (batch,) of the samples in the batch
  const std::int64_t* place;   // (rows,) each row's place in the batch; null: as they come
  const unsigned char* live;   // (rows,) null: all
  std::int64_t uniform, time;  // the first places of the batch were drawn uniformly; what `seen` becomes
  ScoreColumns table;
  double* state;             // (4,) epsilon, rows in the averages, mean g, mean g^2
  const double* transition;  // (classes, classes) P(given | true), a row for each true label; null: epsilon's
  double* counts;            // (classes, classes) averages of P(true) for each given label; null where no transition
  double window;             // rows that the averages remember
  double* scratch;           // (classes,)
};

SELBP_DECLARE_LEVELS(void draw(const DrawProblem& problem); std::int64_t record(const RecordProblem& problem);)

}  // namespace selbp
