// What the memory of this machine delivers: the bandwidth half of the roofline that the benchmarks print.
#pragma once

#include <cstdint>

#include "cpu/level.hpp"

namespace selbp {

SELBP_DECLARE_LEVELS(
    // The sum of `count` floats, read `repeats` times; every thread reads its own contiguous share.
    float stream_read(const float* source, std::int64_t count, int repeats, int n_threads);
    // Copies `count` floats `repeats` times; every thread its own contiguous share.
    void stream_copy(float* target, const float* source, std::int64_t count, int repeats, int n_threads);)

}  // namespace selbp
