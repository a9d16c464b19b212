// The kernels that choose rows, as C++ sees them: one block, launched with a structure that the caller has filled.
#pragma once

#include <cstddef>

namespace selbp {
namespace cuda {

enum class Choice : int { choose = 0, balanced = 1, diverse = 2 };

// `problem`: the structure of selection/selection.hpp, of `bytes` bytes. Launches on `stream` of `device` without
// waiting for it. Returns a CUDA error code.
int launch_choice(Choice kernel, void* problem, std::size_t bytes, int threads, std::size_t shared, int device,
                  void* stream);

}  // namespace cuda
}  // namespace selbp
