// The matching solver on a GPU, as C++ sees it: sizes first, then a launch on the caller's stream.
#pragma once

#include "matching/matching.hpp"

namespace selbp {
namespace cuda {

// A code beside CUDA's own: the problem has more rows to choose than a block can keep in shared memory.
constexpr int kTooManyRows = 1 << 20;

// Whether the kernels run on such a device: a CUDA error code, 0 where they do. Not so for a device for which they were
// not compiled, and with a driver that is older than the runtime which is linked in.
int probe(int device);

// Bytes of global memory that `launch_match` wants for such a batch on such a device (256-byte aligned); negative: a
// CUDA error, of which the absolute value is the code.
std::int64_t match_workspace(const matching::Options& options, std::int64_t batch, bool is_double, int device);

// How many rows at most can be chosen on such a device, in float or double; 0 where the device cannot be asked.
std::int64_t most_rows(bool is_double, int device);

// Solves the problems on `stream` of `device` without waiting for it; allocates nothing. Returns a CUDA error code.
template <class T>
int launch_match(const matching::Options& options, const matching::Problem<T>& problems,
                 const matching::Answer<T>& answers, std::int64_t batch, void* workspace, int device, void* stream);

const char* error_text(int code);

}  // namespace cuda
}  // namespace selbp
