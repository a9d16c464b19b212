// The matching engine on a GPU. Two kernels:
//
//   match_blocks   one block for each problem, its arrays in shared memory, the tableau there too where it fits
//   match_grid     all blocks on one problem after another (a cooperative launch), everything in global memory; for a
//                  few large problems, whose tableau one multiprocessor would take too long to read; not by NVRTC
//
// Per iteration a block passes two barriers: one before the sweep, one in its arg max.
#pragma once

#include "matching/engine.hpp"
#include "team/block_team.cuh"

namespace selbp {
namespace SELBP_LEVEL {

constexpr int kBlockThreads = 512;  // at most
constexpr int kGridThreads = 128;

SELBP_BOTH std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
using DeviceShape = Shape<T, kWarp>;

template <class T>
SELBP_BOTH std::size_t ballot_bytes(int entries) {
  return whole_lines(2 * std::size_t(entries) * sizeof(Best<T>));
}

// Shared memory of a block of match_blocks, and of match_grid.
template <class T>
SELBP_BOTH std::size_t block_shared_bytes(const DeviceShape<T>& shape, bool tableau) {
  return ballot_bytes<T>(kWarp) + whole_lines(shape.array_bytes()) + (tableau ? shape.tableau_bytes() : 0);
}
template <class T>
SELBP_BOTH std::size_t grid_shared_bytes(const DeviceShape<T>& shape) {
  return ballot_bytes<T>(kWarp) + std::size_t(shape.rows) * sizeof(T);
}
// Global memory of one problem of match_blocks whose tableau is not shared, and of a whole match_grid.
template <class T>
SELBP_BOTH std::size_t block_global_bytes(const DeviceShape<T>& shape) {
  return whole_lines(shape.tableau_bytes());
}
template <class T>
SELBP_BOTH std::size_t grid_global_bytes(const DeviceShape<T>& shape, int blocks) {
  return ballot_bytes<T>(blocks) + whole_lines(shape.array_bytes()) + whole_lines(shape.tableau_bytes());
}

template <class T>
SELBP_HD Problem<T> problem_at(const Problem<T>& problems, int n, std::size_t i) {
  const std::size_t rows = std::size_t(n);
  return {problems.gram + i * rows * rows, problems.inner + i * rows, problems.target_sq + i,
          problems.valid ? problems.valid + i * rows : nullptr};
}
template <class T>
SELBP_HD Answer<T> answer_at(const Answer<T>& answers, int k, std::size_t i) {
  const std::size_t rows = std::size_t(k);
  return {answers.indices + i * rows, answers.weights + i * rows, answers.count + i, answers.residual + i,
          answers.status + i};
}

// Block b solves problem b. `tableaus`: global memory for them, or null where they are shared.
template <class T, bool shared_tableau>
__global__ void __launch_bounds__(kBlockThreads, 1)  // 1: registers rather than a second block, which would spill
    match_blocks(Options options, Problem<T> problems, Answer<T> answers, unsigned char* tableaus) {
  SELBP_DYNAMIC_SHARED(shared);
  const DeviceShape<T> shape(options.n, options.k);
  unsigned char* arrays = shared + ballot_bytes<T>(kWarp);
  unsigned char* tableau = shared_tableau ? arrays + whole_lines(shape.array_bytes())
                                          : tableaus + std::size_t(blockIdx.x) * block_global_bytes(shape);
  BlockTeam<T> team(reinterpret_cast<Best<T>*>(shared));
  const Workspace<T, kWarp> work(shape, arrays, tableau, nullptr, 0, 0);
  const Problem<T> problem = problem_at(problems, options.n, blockIdx.x);
  Engine<BlockTeam<T>, T>(team, options, problem, work).solve(answer_at(answers, options.k, blockIdx.x));
}

#ifdef SELBP_GRID_SYNC
template <class T>
__global__ void __launch_bounds__(kGridThreads, 1)
    match_grid(Options options, Problem<T> problems, Answer<T> answers, std::int64_t batch, unsigned char* memory) {
  SELBP_DYNAMIC_SHARED(shared);
  const DeviceShape<T> shape(options.n, options.k);
  unsigned char* arrays = memory + ballot_bytes<T>(int(gridDim.x));
  Workspace<T, kWarp> work(shape, arrays, arrays + whole_lines(shape.array_bytes()), nullptr, 0, 0);
  work.pivot_column = reinterpret_cast<T*>(shared + ballot_bytes<T>(kWarp));  // each block keeps its own copy
  GridTeam<T> team(reinterpret_cast<Best<T>*>(shared), reinterpret_cast<Best<T>*>(memory));
  for (std::int64_t i = 0; i < batch; ++i) {
    const Problem<T> problem = problem_at(problems, options.n, std::size_t(i));
    Engine<GridTeam<T>, T>(team, options, problem, work).solve(answer_at(answers, options.k, std::size_t(i)));
  }
}
#endif

}  // namespace SELBP_LEVEL
}  // namespace selbp
