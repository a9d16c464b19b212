// The matching solver on a CPU, for each x86-64 level.
#pragma once

#include "cpu/level.hpp"
#include "matching/matching.hpp"

namespace selbp {

// Solves `batch` problems on at most `threads` threads; false where memory ran out.
SELBP_DECLARE_LEVELS(bool match_f32(const matching::Options& options, const matching::Problem<float>& problems,
                                    const matching::Answer<float>& answers, std::int64_t batch, int threads);
                     bool match_f64(const matching::Options& options, const matching::Problem<double>& problems,
                                    const matching::Answer<double>& answers, std::int64_t batch, int threads);
                     // One problem, whose Gram matrix is formed row by row.
                     bool match_rows_f32(const matching::Options& options, const matching::Problem<float>& problem,
                                         const matching::Answer<float>& answer, const matching::RowSource& rows);
                     bool match_rows_f64(const matching::Options& options, const matching::Problem<double>& problem,
                                         const matching::Answer<double>& answer, const matching::RowSource& rows);)

}  // namespace selbp
